"""gigatoken runs the kinds of models for which it gives SentencePiece's ids, and no others."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from data_helpers import make_texts, write_shard
from sentencepiece import sentencepiece_model_pb2

from megatron_ttt.data.gigatoken_backend import GigatokenTokenizer
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.errors import UserError

pytest.importorskip("gigatoken")

TEXTS = [*make_texts(300, seed=1), "aab abab aaaa baba  x y " * 9]
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "vocab_size": 420,
    "hard_vocab_limit": False,
    "minloglevel": 2,
}
ACCEPTED = {
    "Llama's": {},
    "numbers": {"split_digits": False, "split_by_unicode_script": False},
    "across words": {"split_by_whitespace": False},
    "no space in front": {"add_dummy_prefix": False},
    "other controls": {"pad_id": 3, "unk_piece": "<UNK>", "control_symbols": ["[x]", "<sep>"]},
}
REFUSED = {
    "it has user-defined": {"user_defined_symbols": ["[x]", "model"]},
    "it normalises text": {"normalization_rule_name": "nmt_nfkc"},
    "it removes extra spaces": {"remove_extra_whitespaces": True},
    "its spaces end words": {"treat_whitespace_as_suffix": True},
    "it has no byte fallback": {"byte_fallback": False},
    "it is not BPE": {"model_type": "unigram"},
}
CHARACTERS = [*"ab </s>[]01x▁\t\n\x00\x1b\x7f\x85\xa0éßİ北京ก“½Ⅷﬁｱ", "\r\n", "e\u0301", "  "]
CHARACTERS += ["🤦🏽‍♂️", "\u200b", "\u2028", "\u3000", "\ufeff", "\ufffd", "\ue000", "\U0010ffff"]
CHARACTERS += ["2024", "</s>", "<s>", "<unk>", "<0x41>", "[x]", "the", "model"]


def train(path: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **LLAMA | options
    )
    path.write_bytes(model.getvalue())
    return path


def odd_texts(processor: sentencepiece.SentencePieceProcessor, count: int) -> Iterator[str]:
    """Characters, pieces, words, runs and any code points at all, in rows of any length."""
    rng = random.Random(7)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    kinds = (
        lambda n: "".join(rng.choices(CHARACTERS, k=n)),
        lambda n: "".join(rng.choices(pieces, k=n)).replace("▁", rng.choice("▁ ")),
        lambda n: "".join(rng.choices("ab ", k=3 * n)),
        lambda n: " ".join(rng.choices(TEXTS[0].split(" "), k=n)),
        lambda n: rng.choice(CHARACTERS) * rng.choice((2, 3, 4, 7, 8, 9, 15, 16, 17, 100)),
        lambda n: " " * rng.randrange(300) + rng.choice(CHARACTERS),
        lambda n: "".join(map(chr, rng.choices(range(0xD800), k=n))),
        lambda n: "".join(map(chr, rng.choices(range(0xE000, 0x110000), k=n))),
    )
    for _ in range(count):
        yield rng.choice(kinds)(rng.choice((1, 2, 3, 5, 8, 20, 60)))


def assert_same_ids(model: Path, count: int = 20_000) -> None:
    tokenizer = GigatokenTokenizer(model)
    for text in odd_texts(tokenizer._processor, count):
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text), repr(text)


def test_no_odd_text_tells_the_two_apart(tmp_path):
    assert_same_ids(train(tmp_path / "tokenizer.model"))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", list(ACCEPTED)[1:])
def test_no_odd_text_tells_the_two_apart_for_another_kind(tmp_path, kind):
    assert_same_ids(train(tmp_path / "tokenizer.model", **ACCEPTED[kind]))


@pytest.mark.matrix
def test_no_odd_text_tells_the_two_apart_for_mistral_s_model():
    mistral_common = pytest.importorskip("mistral_common")
    assert_same_ids(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")


@pytest.mark.parametrize("reason", REFUSED)
def test_a_kind_of_model_that_they_differ_for_is_refused(tmp_path, reason):
    model = train(tmp_path / "tokenizer.model", **REFUSED[reason])
    shard = write_shard(tmp_path / "c4.json", [*TEXTS, "a\x85b"])
    with pytest.raises(UserError, match=rf"gigatoken cannot run {model} \({reason}.*sentencepiece"):
        preprocess([str(shard)], str(tmp_path / "c4"), model, backend="gigatoken")


def tie(model) -> None:
    for number, piece in enumerate(model.pieces):
        piece.score = -float(number // 8)


def add(model, *texts: str, score: float | None = None) -> None:
    for text in texts:
        lowest = -1000.0 - len(model.pieces)
        model.pieces.add(piece=text, score=lowest if score is None else score, type=1)


CHANGES = {
    "it has user-defined or unused": lambda model: setattr(model.pieces[300], "type", 5),
    "some of its pieces have the same score": tie,
    "it has a piece with a character that is none": lambda model: add(model, "</"),
    "two of its pieces spell a byte's": lambda model: add(model, *"<>1", "0x", "0x4", "<0x4", "1>"),
    "it gives other ids for runs of spaces": lambda model: add(
        model, *("▁" * n for n in (4, 5, 6, 7, 10, 11, 12, 15)), score=-5000.0
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_model_that_differs_by_its_pieces_is_refused(tmp_path, reason):
    path = train(tmp_path / "tokenizer.model")
    content = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    CHANGES[reason](content)
    path.write_bytes(content.SerializeToString())
    with pytest.raises(UserError, match=rf"gigatoken cannot run {path} \({reason}"):
        GigatokenTokenizer(path).encode_batch(["text"])
