"""Encoding word by word gives SentencePiece's own ids, and is used only where that is certain."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from data_helpers import make_texts

from megatron_ttt.data import wordwise
from megatron_ttt.data.wordwise import WordwiseEncoder, is_wordwise

STYLE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
OTHER_STYLES = [
    {"model_type": "unigram"},
    {"normalization_rule_name": "nmt_nfkc"},
    {"remove_extra_whitespaces": True},
    {"add_dummy_prefix": False},
    {"split_by_whitespace": False},
    {"treat_whitespace_as_suffix": True},
    {"user_defined_symbols": ["inner model"]},
]
ATOMS = ["a", "the", "model", " ", " ", " ", "  ", "    ", "\u2581", "\u2581\u2581", "\n", "\t"]
ATOMS += ["\u00a0", "\u3000", "\u0301", "\u200b", "é", "北京", "🤦🏽‍♂️", "\x00", "</s>", "<0x41>"]
ATOMS += ["<sep>", "2024", "x" * 40, "☃", "learns."]


def strange_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randint(0, 12))) for _ in range(count)]


def train(**style) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    model = io.BytesIO()
    # Runs of spaces, so that there are pieces made of them alone.
    texts = [text.replace(" at ", "     ") for text in make_texts(200, seed=7)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **({"vocab_size": 420} | STYLE | style),
    )
    content = model.getvalue()
    return content, sentencepiece.SentencePieceProcessor(model_proto=content)


def differences(processor, texts: list[str]) -> int:
    encoder = WordwiseEncoder(processor)
    # Twice, so that words come out of the memory too.
    return sum(encoder.encode(t).tolist() != processor.encode(t) for t in [*texts, *texts])


@pytest.mark.parametrize(
    "style", [{}, {"byte_fallback": False}, {"user_defined_symbols": ["<sep>", "\u2581the"]}]
)
def test_the_ids_are_sentencepiece_s_own(style):
    content, processor = train(**style)
    assert "\u2581\u2581" in {processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    assert is_wordwise(content, processor)
    assert differences(processor, make_texts(200, seed=8) + strange_texts(4000, seed=9)) == 0


@pytest.mark.parametrize("length", [0, 1, 2, 5, 17])
def test_stretches_change_nothing(monkeypatch, length):
    monkeypatch.setattr(wordwise, "_STRETCH_CHARACTERS", length)
    _, processor = train()
    texts = make_texts(50, seed=8) + strange_texts(2000, seed=11)
    assert sum(len(list(wordwise._stretches(text))) for text in texts) > len(texts)
    assert differences(processor, texts) == 0


def test_the_ids_are_those_of_the_real_32k_model():
    mistral_common = pytest.importorskip("mistral_common")
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert is_wordwise(model.read_bytes(), processor)
    texts = [*strange_texts(4000, seed=10), Path(__file__).read_text(), wordwise.__doc__]
    assert differences(processor, texts) == 0


@pytest.mark.parametrize("style", OTHER_STYLES)
def test_models_that_look_beyond_a_word_are_left_to_sentencepiece(style):
    content, processor = train(**style)
    assert not is_wordwise(content, processor)


def test_what_the_condition_is_for():
    _, processor = train(split_by_whitespace=False)
    assert differences(processor, make_texts(200, seed=8)) > 0


def test_no_more_words_are_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(wordwise, "_WORDS", 10)
    _, processor = train()
    encoder = WordwiseEncoder(processor)
    for text in ["x" * 40, *make_texts(200, seed=8), *strange_texts(200, seed=9)]:
        assert encoder.encode(text).tolist() == processor.encode(text)
    assert len(encoder) == 10
    assert max(map(len, encoder)) <= 32
