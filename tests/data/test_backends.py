"""Hugging Face's tokenizer.json, and gigatoken, behind the interface of SentencePiece."""

import json

import numpy as np
import pytest
from data_helpers import byte_level_tokenizer, make_texts, pair, write_shard

from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from megatron_ttt.data.verification import verify
from megatron_ttt.errors import UserError

TEXTS = make_texts(200, seed=5)
STRANGE = ["a</s>b", "<s>", "a <unk> b", "", " ", "  x ", "\n", "a\u2581b", "x" * 5000, "<0x41>"]
STRANGE += ["\u00a0x", "e\u0301", "\ufeffa", "\u200b", "🤦🏽‍♂️", "\x00", "a\r\nb", "ﬁ"]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    byte_level_tokenizer(TEXTS, 400).save(str(path))
    return path


def test_a_tokenizer_json_is_used_as_it_is(tokenizer_json, tmp_path):
    import tokenizers

    tokenizer = load_tokenizer(tokenizer_json)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, -1)
    own = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert tokenizer.vocab_size == own.get_vocab_size()
    write_shard(tmp_path / "c4.json", TEXTS)
    run = ([str(tmp_path / "c4.json")], str(tmp_path / "c4"), tokenizer_json)
    preprocess(*run, append_eod=True, workers=2)
    expected: list[int] = []
    for text in TEXTS:
        expected += [*own.encode(text, add_special_tokens=False).ids, 1]
    tokens, _ = pair(tmp_path / "c4_text_document")
    assert np.frombuffer(tokens, "<u2").tolist() == expected
    assert "200 decode to the very text" in list(verify(str(tmp_path / "c4"), samples=200))[-1]


def test_control_tokens_in_a_text_are_text(tokenizer_json, tokenizer):
    for each in (load_tokenizer(tokenizer_json), tokenizer):
        ids = each.encode("a</s><s>b")
        assert not {each.bos_id, each.eos_id} & set(ids)
        assert each.encode_batch(["a</s><s>b"])[0].tolist() == ids
        assert each.decode(ids) == "a</s><s>b"


def test_tokenizer_config_names_the_control_tokens(tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<s>"}}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, 0)
    config.write_text(json.dumps({"model_max_length": 1}))
    with pytest.raises(UserError, match="has no EOS piece"):
        preprocess(["x"], str(tmp_path / "c4"), tmp_path / "tokenizer.json", append_eod=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_control_token_that_text_becomes_is_refused(tokenizer_json, tmp_path):
    content = json.loads(tokenizer_json.read_text())
    content["added_tokens"][1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: a text that spells .* '</s>' becomes"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_unigram_model_that_has_the_control_token_as_a_piece_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("</s>", 0.0), *((letter, -1.0) for letter in "</s>ab")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 1, False))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(UserError, match=r"becomes it; it is a piece of the model itself"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_gigatoken_writes_the_bytes_of_sentencepiece(tokenizer, tmp_path):
    pytest.importorskip("gigatoken")
    write_shard(tmp_path / "c4.json", TEXTS + STRANGE)
    run = [str(tmp_path / "c4.json")]
    preprocess(run, str(tmp_path / "a"), tokenizer.model_path, append_eod=True)
    preprocess(run, str(tmp_path / "b"), tokenizer.model_path, append_eod=True, backend="gigatoken")
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "b_text_document")


def test_gigatoken_is_made_anew_before_its_cache_grows_large(tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    from megatron_ttt.data import gigatoken_backend

    monkeypatch.setattr(gigatoken_backend, "_CACHE_TEXT", 1000)
    made, load = [], gigatoken_backend.GigatokenTokenizer._load

    def count(self):
        load(self)
        made.append(self._text_left)

    monkeypatch.setattr(gigatoken_backend.GigatokenTokenizer, "_load", count)
    fast = gigatoken_backend.GigatokenTokenizer(tokenizer.model_path)
    for text in TEXTS:
        assert fast.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert len(made) > 10


def test_other_control_tokens_are_another_tokenizer(tokenizer_json, tmp_path):
    """They are named in a file beside the model, which the model's checksum knows nothing of."""
    model, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    model.write_bytes(tokenizer_json.read_bytes())
    config.write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    write_shard(tmp_path / "a.json", TEXTS)
    (tmp_path / "b.json").write_text("{}")
    run = ([f"{tmp_path}/?.json"], str(tmp_path / "c4"), model)
    options = {"append_eod": True, "prepend_bos": True}
    with pytest.raises(UserError, match=r"b\.json:1"):
        preprocess(*run, **options)
    write_shard(tmp_path / "b.json", TEXTS)
    config.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with pytest.raises(UserError, match="begun with other options: bos_id was 1 and is 0"):
        preprocess(*run, **options)
    config.write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    preprocess(*run, **options)
    assert any("only ends, with EOS" in line for line in verify(run[1]))
    config.write_text("[]")
    with pytest.raises(UserError, match="it is no JSON object"):
        list(verify(run[1]))
    config.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with pytest.raises(UserError, match="has the bos_id 0, in the build it was 1"):
        list(verify(run[1]))


def test_gigatoken_is_refused_where_it_differs(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    write_shard(tmp_path / "a.json", TEXTS)
    write_shard(tmp_path / "b.json", ["other", *TEXTS])
    from megatron_ttt.data.gigatoken_backend import GigatokenTokenizer

    real = GigatokenTokenizer.encode_batch

    def wrong(self, texts):
        ids = real(self, texts)
        return [i[:-1] if text == "other" else i for i, text in zip(ids, texts)]

    monkeypatch.setattr(GigatokenTokenizer, "encode_batch", wrong)
    run = ([f"{tmp_path}/?.json"], str(tmp_path / "c4"), tokenizer.model_path)
    with pytest.raises(UserError, match=r"b\.json:1: gigatoken gives other ids than Sentence"):
        preprocess(*run, backend="gigatoken", on_error="skip")
    assert len(list((tmp_path / "c4.tasks").glob("*.manifest.json"))) == 1
    assert not list(tmp_path.glob("*.bin"))


def test_the_real_32k_model_on_prose(tmp_path):
    mistral_common = pytest.importorskip("mistral_common")
    from pathlib import Path

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 1, 2)
    write_shard(tmp_path / "c4.json", STRANGE + TEXTS)
    prefix = str(tmp_path / "c4")
    preprocess([str(tmp_path / "c4.json")], prefix, model, prepend_bos=True, append_eod=True)
    assert list(verify(prefix, samples=300))[-1].startswith("218 documents encoded anew")
