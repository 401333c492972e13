import fcntl
import gzip
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import tty
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import pair, write_shard
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

from megatron_ttt.data import progress
from megatron_ttt.data.atomic_file import PartialFile
from megatron_ttt.data.dataset import build_datasets
from megatron_ttt.data.indexed import check_indexed
from megatron_ttt.data.preprocess import merge, preprocess
from megatron_ttt.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


def by_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> tuple[bytes, bytes]:
    """The .bin and .idx of megatron-core's builder for the ids of some documents."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return pair(prefix)


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


def test_megatron_core_opens_the_files_and_they_decode_to_the_source(shards, tokenizer, tmp_path):
    prefix = str(tmp_path / "c4_text_document")
    preprocess(
        [f"{shards[0]}/*.gz"],
        str(tmp_path / "c4"),
        tokenizer.model_path,
        append_eod=True,
        workers=2,
    )
    dataset = IndexedDataset(prefix)  # its documents are views: it must outlive them
    documents = [ids.tolist() for ids in dataset[:]]
    texts = [text for text in shards[1] if text]
    assert [tokenizer.decode(ids) for ids in documents] == texts
    tokens = [token for ids in documents for token in ids]
    train, _ = build_datasets(
        prefix,
        None,
        train_samples=(len(tokens) - 1) // 16,
        validation_samples=0,
        seq_length=16,
        seed=3,
        cache_dir=tmp_path / "cache",
    )
    read = np.concatenate([train[i][:-1] for i in range(len(train))])
    # The stream is shuffled by documents: an epoch's windows leave out less than one of them.
    missing = np.bincount(tokens, minlength=330) - np.bincount(read, minlength=330)
    assert missing.min() >= 0
    assert missing.sum() == len(tokens) - len(read)


def test_the_number_of_workers_changes_nothing(shards, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ttt.data.shards.CHUNK_BYTES", 1 << 10)
    options = {"json_keys": ["url", "text"], "append_eod": True}
    for workers in [1, 2, 3]:
        prefix = str(tmp_path / str(workers))
        preprocess([f"{shards[0]}/*.gz"], prefix, tokenizer.model_path, workers=workers, **options)
    for key in ["text", "url"]:
        one = pair(tmp_path / f"1_{key}_document")
        assert one == pair(tmp_path / f"2_{key}_document") == pair(tmp_path / f"3_{key}_document")
        assert check_indexed(tmp_path / f"1_{key}_document").documents == len(shards[1])


def test_existing_output_stays_unless_overwritten(shards, tokenizer, tmp_path):
    shard = write_shard(tmp_path / "other.json", ["something else"])
    run = (str(tmp_path / "c4"), tokenizer.model_path)
    preprocess([str(shard)], *run)
    before = pair(tmp_path / "c4_text_document")
    with pytest.raises(UserError, match=r"made from other shards.*--overwrite"):
        preprocess([f"{shards[0]}/*.gz"], *run)
    assert pair(tmp_path / "c4_text_document") == before
    preprocess([f"{shards[0]}/*.gz"], *run, overwrite=True)
    assert check_indexed(tmp_path / "c4_text_document").documents == len(shards[1])


def test_a_crash_between_the_two_renames_leaves_no_index_of_another_bin(
    shards, tokenizer, tmp_path, monkeypatch
):
    run = ([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
    preprocess(*run)
    publish = PartialFile.publish

    def crash_at_the_index(self):
        if self.path.name == "c4_text_document.idx":
            raise RuntimeError("the machine stops")
        publish(self)

    monkeypatch.setattr(PartialFile, "publish", crash_at_the_index)
    with pytest.raises(RuntimeError, match="stops"):
        preprocess(*run, append_eod=True, overwrite=True)
    assert [path.name for path in tmp_path.glob("c4_*")] == ["c4_text_document.bin"]


def test_the_tool_takes_globs_and_reports_progress(shards, tokenizer, tmp_path):
    command = [sys.executable, TOOLS / "preprocess_c4.py"]
    command += ["--input", f"{shards[0]}/*00000*", f"{shards[0]}/*00001*", "--append-eod"]
    command += ["--output-prefix", f"{tmp_path}/c4", "--tokenizer-model", tokenizer.model_path]
    first = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True)
    assert first.returncode == 0
    assert "250 documents (" in first.stderr
    assert "250 documents (" in (tmp_path / "c4.log").read_text()
    tokens, _ = pair(tmp_path / "c4_text_document")
    assert np.frombuffer(tokens, np.uint16)[-1] == tokenizer.eos_id
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, f"{tmp_path}/c4 is complete: nothing to do\n")
    second = subprocess.run([*command[:-1], "nowhere"], capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("error: ")
    assert len(second.stderr.splitlines()) == 1
    assert subprocess.run([*command, "--workers", "0"], capture_output=True).returncode == 2


def test_a_terminal_shows_one_line_that_is_written_over(shards, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        made = preprocess([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
        shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    *lines, published, summary, _ = shown.split("\n")
    *refreshed, last = "".join(lines).split("\r")
    assert all(len(line) == 59 for line in (*refreshed[1:], last))
    assert last.startswith("2 of 2 shards, ETA 0:00:00, ")
    assert published == f"published c4_text_document: 250 documents, {made.tokens['text']:,} tokens"
    assert summary.startswith("250 documents (")
    begins, *others = (tmp_path / "c4.log").read_text().splitlines()
    assert ' begins: 2 shards to do, {"backend": "sentencepiece", ' in begins
    assert len(others) == len(refreshed) + 2 + 2


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


def test_other_files_of_that_name_stay_unless_overwritten(shards, tokenizer, tmp_path):
    (tmp_path / "c4_text_document.bin").write_text("mine")
    run = ([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
    with pytest.raises(UserError, match=r"c4_text_document\.bin exists.*--overwrite"):
        preprocess(*run)
    assert [path.name for path in tmp_path.iterdir()] == ["c4_text_document.bin"]
    preprocess(*run, overwrite=True)
    assert check_indexed(tmp_path / "c4_text_document").documents == len(shards[1])


def test_splits_and_groups_share_the_documents_out(shards, tokenizer, tmp_path):
    run = ([f"{shards[0]}/*.gz"], str(tmp_path / "c4"), tokenizer.model_path)
    halves = preprocess(*run, split="hash", validation_fraction=0.3)
    counts = {
        split: check_indexed(tmp_path / f"c4-{split}_text_document").documents
        for split in ("train", "validation")
    }
    assert sum(counts.values()) == halves.documents == len(shards[1])
    assert 0.2 < counts["validation"] / len(shards[1]) < 0.4
    preprocess(run[0], str(tmp_path / "grouped"), run[2], groups=2)
    first = check_indexed(tmp_path / "grouped-00000-of-00002_text_document")
    second = check_indexed(tmp_path / "grouped-00001-of-00002_text_document")
    assert (first.documents, second.documents) == (150, 100)
    with pytest.raises(UserError, match="--groups 3 of 2 shards"):
        preprocess(run[0], str(tmp_path / "three"), run[2], groups=3)


def test_c4_s_own_split_goes_by_the_names(shards, tokenizer, tmp_path):
    for name, count in (("c4-train.00000-of-00001.json", 5), ("c4-validation.00000.json", 3)):
        write_shard(tmp_path / name, ["words"] * count)
    run = (str(tmp_path / "c4"), tokenizer.model_path)
    preprocess([f"{tmp_path}/*.json"], *run, split="name")
    assert check_indexed(tmp_path / "c4-train_text_document").documents == 5
    assert check_indexed(tmp_path / "c4-validation_text_document").documents == 3
    with pytest.raises(UserError, match="no shard for the split 'validation'"):
        preprocess([f"{tmp_path}/*train*.json"], str(tmp_path / "t"), run[1], split="name")
    assert not list(tmp_path.glob("t*.tasks"))


def test_the_parts_of_an_array_and_a_merge_are_one_run(shards, tokenizer, tmp_path):
    inputs = [f"{shards[0]}/*.gz"]
    preprocess(inputs, str(tmp_path / "one"), tokenizer.model_path)
    run = (inputs, str(tmp_path / "c4"), tokenizer.model_path)
    assert preprocess(*run, array=(1, 2)) is None
    with pytest.raises(UserError, match=r"00000-of-00002.json.gz is not done"):
        merge(str(tmp_path / "c4"))
    assert preprocess(*run, array=(0, 2)) is None
    assert merge(str(tmp_path / "c4")).documents == len(shards[1])
    assert pair(tmp_path / "c4_text_document") == pair(tmp_path / "one_text_document")
    with pytest.raises(UserError, match="--array 2/2 is no part"):
        preprocess(*run, array=(2, 2))
