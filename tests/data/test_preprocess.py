import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_shard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_ttt.data import preprocess as module
from megatron_ttt.data.indexed import check_indexed
from megatron_ttt.data.partial_file import PartialFile
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


def by_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> tuple[bytes, bytes]:
    """The .bin and .idx of megatron-core's builder for the ids of some documents."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return pair(prefix)


def pair(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eod", [False, True])
def test_files_are_those_of_megatron_core(shards, tokenizer, tmp_path, bos, eod):
    directory, texts = shards
    encoded = [tokenizer.encode(text) for text in texts]
    assert [] in encoded
    documents = [[1] * bos + ids + [2] * eod if ids else [] for ids in encoded]
    summary = preprocess(
        [f"{directory}/*.gz"],
        str(tmp_path / "c4"),
        tokenizer.model_path,
        append_eod=eod,
        prepend_bos=bos,
    )
    assert pair(tmp_path / "c4_text_document") == by_megatron(tmp_path / "m", documents, 330)
    assert summary.documents == len(texts)
    assert summary.tokens == {"text": sum(map(len, documents))}
    assert summary.text_bytes == sum(len(text.encode()) for text in texts)


def test_the_number_of_workers_changes_nothing(shards, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 1 << 10)
    options = {"json_keys": ["url", "text"], "append_eod": True}
    for workers in [1, 2, 3]:
        prefix = str(tmp_path / str(workers))
        preprocess([f"{shards[0]}/*.gz"], prefix, tokenizer.model_path, workers=workers, **options)
    for key in ["text", "url"]:
        one = pair(tmp_path / f"1_{key}_document")
        assert one == pair(tmp_path / f"2_{key}_document") == pair(tmp_path / f"3_{key}_document")
        assert check_indexed(tmp_path / f"1_{key}_document").documents == len(shards[1])


def test_malformed_lines_are_skipped_counted_and_located(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_BATCH_BYTES", 64)
    shard = tmp_path / "c4.json"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(20)]
    lines[13] = "{"
    shard.write_text("\n".join(lines))
    summary = preprocess([str(shard)], str(tmp_path / "c4"), tokenizer.model_path)
    assert (summary.documents, summary.malformed_lines) == (19, 1)
    assert f"skipped {shard}:14: " in capsys.readouterr().err


def test_existing_output_stays_unless_overwritten(shards, tokenizer, tmp_path):
    shard = write_shard(tmp_path / "other.json", ["something else"])
    run = (str(tmp_path / "c4"), tokenizer.model_path)
    preprocess([str(shard)], *run)
    before = pair(tmp_path / "c4_text_document")
    with pytest.raises(UserError, match=r"c4_text_document\.bin exists.*--overwrite"):
        preprocess([f"{shards[0]}/*.gz"], *run)
    assert pair(tmp_path / "c4_text_document") == before
    preprocess([f"{shards[0]}/*.gz"], *run, overwrite=True)
    assert check_indexed(tmp_path / "c4_text_document").documents == len(shards[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_leaves_nothing_new_and_the_old_output_whole(tokenizer, tmp_path, workers):
    good = write_shard(tmp_path / "a.json.gz", ["good " * 50] * 50)
    output = tmp_path / "out"
    run = (str(output / "c4"), tokenizer.model_path)
    preprocess([str(good)], *run)
    before = {path: path.read_bytes() for path in output.iterdir()}
    (tmp_path / "b.json.gz").write_bytes(good.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.json\.gz is truncated"):
        preprocess([f"{tmp_path}/*.gz"], *run, workers=workers, overwrite=True)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_crash_between_the_two_renames_leaves_no_index_of_another_bin(
    shards, tokenizer, tmp_path, monkeypatch
):
    run = ([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
    preprocess(*run)
    publish = PartialFile.publish

    def crash_at_the_index(self):
        if self.path.suffix == ".idx":
            raise KeyboardInterrupt
        publish(self)

    monkeypatch.setattr(PartialFile, "publish", crash_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        preprocess(*run, append_eod=True, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c4_text_document.bin"]


def test_input_without_tokens_is_refused(tokenizer, tmp_path):
    shard = write_shard(tmp_path / "c4.json", ["", ""])
    for key, malformed in [("text", 0), ("content", 2)]:
        with pytest.raises(UserError, match=f"no tokens .*'{key}'.*{malformed} malformed"):
            preprocess(
                [str(shard)], str(tmp_path / "out" / "c4"), tokenizer.model_path, json_keys=[key]
            )
        assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_a_user_error(shards, tokenizer, tmp_path, monkeypatch):
    def full(self, tokens, lengths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.indexed.IndexedWriter, "append", full)
    with pytest.raises(UserError, match=r"cannot write .*c4: No space left on device"):
        preprocess([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
    assert not list(tmp_path.iterdir())


def test_the_tool_takes_globs_and_reports_progress(shards, tokenizer, tmp_path):
    command = [sys.executable, TOOLS / "preprocess_c4.py"]
    command += ["--input", f"{shards[0]}/*00000*", f"{shards[0]}/*00001*", "--append-eod"]
    command += ["--output-prefix", f"{tmp_path}/c4", "--tokenizer-model", tokenizer.model_path]
    first = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True)
    assert first.returncode == 0
    assert first.stderr.startswith("250 documents (")
    tokens, _ = pair(tmp_path / "c4_text_document")
    assert np.frombuffer(tokens, np.uint16)[-1] == tokenizer.eos_id
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("error: ")
    assert len(second.stderr.splitlines()) == 1
    assert subprocess.run([*command, "--workers", "0"], capture_output=True).returncode == 2


def test_the_tools_start_without_torch():
    code = (
        "import sys, preprocess_c4, train_tokenizer; print({'torch', 'megatron'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


def test_gzip_members_one_after_the_other_are_one_shard(tokenizer, tmp_path):
    members = [gzip.compress(json.dumps({"text": text}).encode() + b"\n") for text in "ab"]
    (tmp_path / "c4.json.gz").write_bytes(b"".join(members))
    summary = preprocess([f"{tmp_path}/c4*"], str(tmp_path / "c4"), tokenizer.model_path)
    assert summary.documents == 2
