"""Stopping a run in every way there is, and what the next one makes of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from data_helpers import make_texts, pair, write_shard
from kill_preprocess import kill_test

from megatron_ttt.data import concatenation, shard_jobs
from megatron_ttt.data.atomic_file import PartialFile
from megatron_ttt.data.build_folder import Workspace
from megatron_ttt.data.preprocess import merge, preprocess
from megatron_ttt.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_c4.py"


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """Three shards, and the arguments of a run over them."""
    for i in range(3):
        write_shard(tmp_path / f"c4-train.{i:05d}.json.gz", make_texts(60, seed=i))
    return [f"{tmp_path}/c4-train.*"], str(tmp_path / "c4"), tokenizer.model_path


def reference(corpus, tmp_path) -> tuple[bytes, bytes]:
    preprocess(corpus[0], str(tmp_path / "reference"), corpus[2])
    return pair(tmp_path / "reference_text_document")


class Broken(Exception):
    pass


@pytest.fixture
def stop_at_shard(monkeypatch):
    """Let the reading of shards fail from the n-th on; returns the names of those read."""
    read, real = [], shard_jobs.read_blocks

    def install(number):
        def read_blocks(shard, *options):
            if number is not None and len(read) >= number:
                raise Broken
            read.append(shard.name)
            return real(shard, *options)

        read.clear()
        monkeypatch.setattr(shard_jobs, "read_blocks", read_blocks)
        return read

    return install


def test_what_is_done_is_not_done_again(corpus, tmp_path, stop_at_shard):
    expected = reference(corpus, tmp_path)
    read = stop_at_shard(2)
    with pytest.raises(Broken):
        preprocess(*corpus)
    assert read == ["c4-train.00000.json.gz", "c4-train.00001.json.gz"]
    assert not Path(f"{corpus[1]}_text_document.bin").exists()
    read = stop_at_shard(None)
    preprocess(*corpus)
    assert read == ["c4-train.00002.json.gz"]
    assert pair(f"{corpus[1]}_text_document") == expected
    assert not Path(f"{corpus[1]}.tasks").exists()


def test_a_shard_that_changed_is_done_again(corpus, tmp_path, stop_at_shard):
    stop_at_shard(2)
    with pytest.raises(Broken):
        preprocess(*corpus)
    write_shard(tmp_path / "c4-train.00001.json.gz", ["another text"])
    read = stop_at_shard(None)
    preprocess(*corpus)
    assert read == ["c4-train.00001.json.gz", "c4-train.00002.json.gz"]
    assert pair(f"{corpus[1]}_text_document") == reference(corpus, tmp_path)


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "gone"])
@pytest.mark.parametrize("file", ["bin", "idx"])
def test_a_damaged_part_is_done_again_never_merged(corpus, tmp_path, stop_at_shard, file, damage):
    expected = reference(corpus, tmp_path)
    stop_at_shard(2)
    with pytest.raises(Broken):
        preprocess(*corpus)
    (part,) = Path(f"{corpus[1]}.tasks").glob(f"c4-train.00001*.{file}")
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(content[:-2] if damage == "shorter" else b"\1\1" + content[2:])
    stop_at_shard(None)
    if damage == "other bytes":
        with pytest.raises(UserError, match="is damaged"):
            preprocess(*corpus)
        assert not Path(f"{corpus[1]}_text_document.bin").exists()
    preprocess(*corpus)
    assert pair(f"{corpus[1]}_text_document") == expected


def test_a_task_of_other_options_is_done_again(corpus, tmp_path, stop_at_shard):
    """One on another machine may outlive its run, and publish after the next has begun."""
    expected = reference(corpus, tmp_path)
    stop_at_shard(2)
    with pytest.raises(Broken):
        preprocess(*corpus)
    (path,) = Path(f"{corpus[1]}.tasks").glob("c4-train.00001*.manifest.json")
    manifest = json.loads(path.read_text())
    manifest["options"]["append_eod"] = True
    path.write_text(json.dumps(manifest))
    read = stop_at_shard(None)
    preprocess(*corpus)
    assert read == ["c4-train.00001.json.gz", "c4-train.00002.json.gz"]
    assert pair(f"{corpus[1]}_text_document") == expected


def test_mixed_options_are_refused(corpus, stop_at_shard):
    stop_at_shard(1)
    with pytest.raises(Broken):
        preprocess(*corpus)
    stop_at_shard(None)
    manifests = sorted(Path(f"{corpus[1]}.tasks").iterdir())
    with pytest.raises(UserError, match="append_eod was False and is True"):
        preprocess(*corpus, append_eod=True)
    assert sorted(Path(f"{corpus[1]}.tasks").iterdir()) == manifests
    preprocess(*corpus, append_eod=True, overwrite=True)
    with pytest.raises(UserError, match="append_eod was True and is False"):
        preprocess(*corpus)


def test_another_tokenizer_is_refused(corpus, tmp_path, stop_at_shard):
    stop_at_shard(1)
    with pytest.raises(Broken):
        preprocess(*corpus)
    stop_at_shard(None)
    from megatron_ttt.data.tokenizer_training import train_tokenizer

    other = train_tokenizer(corpus[0], str(tmp_path / "other"), 325)
    with pytest.raises(UserError, match="tokenizer was"):
        preprocess(*corpus[:2], other)


def test_manifests_say_what_a_shard_was_made_from(corpus, tmp_path, stop_at_shard, tokenizer):
    import hashlib

    stop_at_shard(1)
    with pytest.raises(Broken):
        preprocess(*corpus)
    (path,) = Path(f"{corpus[1]}.tasks").glob("*.manifest.json")
    manifest = json.loads(path.read_text())
    source = (tmp_path / "c4-train.00000.json.gz").read_bytes()
    assert manifest["input"]["size"] == len(source)
    assert manifest["input"]["sha256"] == hashlib.sha256(source).hexdigest()
    assert manifest["options"]["tokenizer"] == tokenizer.unique_identifiers["sha256"]
    assert manifest["documents"] == 60
    for file in ("bin", "idx"):
        content = path.with_name(path.name.replace(".manifest.json", f"_text.{file}")).read_bytes()
        entry = manifest["streams"]["text"][file]
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_crash_of_the_merge_is_made_good(corpus, tmp_path, monkeypatch):
    expected = reference(corpus, tmp_path)
    publish, put, read = PartialFile.publish, concatenation.publish_json, []

    def break_at(victim: str) -> None:
        """Crash where a file is to get its name, or when the n-th part is in its place."""

        def crash(self):
            if self.path.name == victim:
                raise Broken
            publish(self)

        def crash_in_place(path, content):
            if len(list(path.parent.glob("*.copied"))) == int(victim):
                raise Broken
            put(path, content)

        patch = monkeypatch.setattr
        patch(PartialFile, "publish", crash)
        patch(concatenation, "publish_json", crash_in_place if victim.isdigit() else put)
        if victim.endswith(".bin"):
            patch(concatenation.Concatenation, "publish", crash_always)

    def crash_always(self):
        raise Broken

    really = concatenation.Concatenation.publish
    for victim in ("1", "2", "c4_text_document.bin", "c4_text_document.idx", "c4.manifest.json"):
        break_at(victim)
        with pytest.raises(Broken):
            preprocess(*corpus)
        monkeypatch.setattr(concatenation.Concatenation, "publish", really)
        parts = list((tmp_path / "c4.tasks").glob("*.bin"))
        if victim.isdigit():
            assert len(parts) == 3 - int(victim) + 1  # and the file they are copied to
            assert not Path(f"{corpus[1]}_text_document.bin").exists()
        if victim == "1":
            monkeypatch.setattr(shard_jobs, "read_blocks", read.append)  # nothing is read again
    break_at("")
    preprocess(*corpus)
    assert pair(f"{corpus[1]}_text_document") == expected and not read


def test_parts_in_other_places_are_made_again(corpus, tmp_path, monkeypatch):
    """More shards, or a damaged file, move what was copied before: no wrong bytes come of it."""
    real = concatenation.Concatenation.publish

    def crash(self):
        raise Broken

    def leave_copied() -> None:
        monkeypatch.setattr(concatenation.Concatenation, "publish", crash)
        with pytest.raises(Broken):
            preprocess(*corpus)
        monkeypatch.setattr(concatenation.Concatenation, "publish", real)

    leave_copied()
    write_shard(tmp_path / "c4-train.00000b.json.gz", make_texts(60, seed=9))
    with pytest.raises(UserError, match=r"c4-train\.00000\.\S*text \(and 2 more\) is damaged"):
        preprocess(*corpus)
    leave_copied()
    merged = tmp_path / "c4.tasks/c4_text_document.bin"
    content = bytearray(merged.read_bytes())
    content[-1] ^= 1
    merged.write_bytes(content)
    with pytest.raises(UserError, match=r"c4-train\.00002\S*text is damaged"):
        preprocess(*corpus)
    preprocess(*corpus)
    assert pair(f"{corpus[1]}_text_document") == reference(corpus, tmp_path)


def test_manifests_go_before_the_files_they_name(corpus, stop_at_shard, monkeypatch):
    stop_at_shard(2)
    with pytest.raises(Broken):
        preprocess(*corpus)
    removed, unlink = [], Path.unlink

    def record(path, missing_ok=False):
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    Workspace(corpus[1]).clear()
    kinds = ["".join(Path(name).suffixes[-2:]) for name in removed]
    assert kinds[:3] == [".json", ".manifest.json", ".manifest.json"]
    assert len(kinds) == 3 + 4


def command_of(corpus, *more) -> list[str]:
    command = [sys.executable, str(TOOL), "--input", *corpus[0], "--output-prefix", corpus[1]]
    return [*command, "--tokenizer-model", str(corpus[2]), *more]


@pytest.fixture
def slow_run():
    started = []

    def start(*arguments):
        started.append(start_slow_run(*arguments))
        return started[-1]

    yield start
    for process, _ in started:
        process.kill()
        process.wait()
        process.stderr.close()


def start_slow_run(tmp_path, tokenizer, *more) -> tuple[subprocess.Popen, tuple]:
    """A run in another process that waits, at work, for a shard that nobody writes yet."""
    write_shard(tmp_path / "slow.00000.json", make_texts(60, seed=0))
    os.mkfifo(tmp_path / "slow.00001.json")
    corpus = ([f"{tmp_path}/slow.0*.json"], str(tmp_path / "slow"), tokenizer.model_path)
    process = subprocess.Popen(command_of(corpus, *more), stderr=subprocess.PIPE, text=True)
    while not (Path(f"{corpus[1]}.tasks") / "plan.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process, corpus


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_state_to_go_on_from(slow_run, tokenizer, tmp_path, number):
    process, corpus = slow_run(tmp_path, tokenizer, "--workers", "1")
    with pytest.raises(UserError, match=rf"another run works on .*process {process.pid} on "):
        preprocess(*corpus)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}; the same command goes on from here" in errors
    assert "Traceback" not in errors
    tasks_left = {path.suffix for path in Path(f"{corpus[1]}.tasks").iterdir()}
    assert ".partial" not in tasks_left
    (tmp_path / "slow.00001.json").unlink()
    write_shard(tmp_path / "slow.00001.json", make_texts(60, seed=1))
    preprocess(*corpus)
    assert pair(f"{corpus[1]}_text_document") == reference(corpus, tmp_path)


@pytest.mark.parametrize("opened", [1, 2], ids=["a shard's", "the merge's"])
def test_a_signal_while_files_are_opened_leaves_none(corpus, tmp_path, monkeypatch, opened):
    inputs = [f"{tmp_path}/c4-train.00000*"]
    temporary_file, calls = tempfile.TemporaryFile, []

    def interrupted(**options):
        calls.append(options)
        if len(calls) == opened:
            signal.raise_signal(signal.SIGTERM)
        return temporary_file(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", interrupted)
    with pytest.raises(SystemExit, match="143"):
        preprocess(inputs, *corpus[1:])
    assert len(calls) == opened
    assert not list(tmp_path.rglob("*.partial"))


def test_a_killed_run_leaves_no_lock(slow_run, tokenizer, tmp_path):
    process, corpus = slow_run(tmp_path, tokenizer, "--workers", "2")
    process.kill()
    process.communicate()
    (tmp_path / "slow.00001.json").unlink()
    write_shard(tmp_path / "slow.00001.json", make_texts(60, seed=1))
    preprocess(*corpus)
    assert pair(f"{corpus[1]}_text_document") == reference(corpus, tmp_path)


def test_parts_of_an_array_work_side_by_side_and_each_only_once(corpus, tmp_path):
    expected = reference(corpus, tmp_path)
    with Workspace(corpus[1]).locked("0-of-2"):
        with pytest.raises(UserError, match="another run works on"):
            preprocess(*corpus, array=(0, 2))
        with pytest.raises(UserError, match="another run works on"):
            preprocess(*corpus)
        with pytest.raises(UserError, match="another run works on"):
            merge(corpus[1])
        preprocess(*corpus, array=(1, 2))
    preprocess(*corpus, array=(0, 2))
    with pytest.raises(UserError, match="was planned with other shards"):
        preprocess([f"{tmp_path}/c4-train.00000*"], *corpus[1:], array=(0, 2))
    merge(corpus[1])
    assert pair(f"{corpus[1]}_text_document") == expected
    preprocess(*corpus, array=(0, 2))  # once more, too late
    merge(corpus[1])
    assert pair(f"{corpus[1]}_text_document") == expected
    assert not Path(f"{corpus[1]}.tasks").exists()


@pytest.mark.kills
@pytest.mark.timeout(300)
def test_killed_at_random_moments(tmp_path):
    assert kill_test(tmp_path, kills=5, workers=2, seed=0)["killed"] == 5
