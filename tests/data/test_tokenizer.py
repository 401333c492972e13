import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import write_shard

from megatron_ttt.data.tokenizer import SentencePieceTokenizer, check_vocabulary
from megatron_ttt.data.tokenizer_training import train_tokenizer
from megatron_ttt.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


def test_special_pieces_stand_where_llama_has_them(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (330, 1, 2)
    assert tokenizer.pad_id == -1
    assert tokenizer.decode([3 + 0xC3, 3 + 0xA9]) == "é"  # the 256 bytes follow


def test_text_survives_the_round_trip(tokenizer):
    text = "  the inner\n\n\tmodel 2024 ☃ 北京 é"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert 3 + ord("\n") in ids
    assert len(tokenizer.encode(" 2024")) == 1 + len(" 2024")  # digits stand alone
    assert tokenizer.decode([1, *ids, 2]) == text


def test_the_same_documents_give_the_same_model(shards, tokenizer, tmp_path):
    again = train_tokenizer([f"{shards[0]}/*.gz"], str(tmp_path / "again"), 330)
    assert again.read_bytes() == tokenizer.model_path.read_bytes()
    assert SentencePieceTokenizer(again).unique_identifiers == tokenizer.unique_identifiers
    other = train_tokenizer([f"{shards[0]}/*.gz"], str(tmp_path / "other"), 320)
    assert SentencePieceTokenizer(other).unique_identifiers != tokenizer.unique_identifiers


def test_the_tool_trains_quietly_and_refuses_to_overwrite(shards, tmp_path):
    command = [sys.executable, TOOL, "--input", f"{shards[0]}/*.gz", "--vocab-size", "320"]
    command += ["--output-prefix", f"{tmp_path}/new/tok"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert (first.returncode, first.stdout, first.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tok.model"]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert "tok.model exists" in second.stderr
    assert subprocess.run([*command, "--overwrite"]).returncode == 0


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_a_vocabulary_that_does_not_fit_is_refused(shards, tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"no tokenizer of {vocab_size} pieces") as error:
        train_tokenizer([f"{shards[0]}/*.gz"], str(tmp_path / "t"), vocab_size)
    assert "trainer_interface" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_reader_reach_the_user(tmp_path):
    shard = tmp_path / "c4.json.gz"
    shard.write_bytes(b"plain text, and no gzip stream at all")
    with pytest.raises(UserError, match=r"c4\.json\.gz is corrupt"):
        train_tokenizer([str(shard)], str(tmp_path / "t"), 300)


def test_what_is_left_out_of_the_training_is_said(shards, tmp_path, capsys):
    size = sum(len(text.encode()) for text in shards[1][:100])
    run = ([f"{shards[0]}/*.gz"], str(tmp_path / "t"), 330)
    train_tokenizer(*run, max_bytes=size)
    assert "on the first 100 documents (0.0 MB); the rest is left out" in capsys.readouterr().err
    write_shard(tmp_path / "100.json", shards[1][:100])
    hundred = train_tokenizer([f"{tmp_path}/100.json"], str(tmp_path / "u"), 330)
    assert hundred.read_bytes() == (tmp_path / "t.model").read_bytes()
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"no text in .* within 0 bytes"):
        train_tokenizer(*run, max_bytes=0, overwrite=True)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_missing_or_broken_model_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        SentencePieceTokenizer(path)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    check_vocabulary(tokenizer, 330)
    with pytest.raises(UserError, match="has 330 pieces, the model's vocabulary 329"):
        check_vocabulary(tokenizer, 329)
