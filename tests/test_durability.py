"""What is published was brought to the disk before it got its name, and its name after that."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from data.data_helpers import make_texts, write_shard
from small_run import small_recipe

from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.tokenizer_training import train_tokenizer


@pytest.fixture
def events(monkeypatch, tmp_path):
    """What was synced and renamed so far, also in forks: files, and (file, new path)."""
    log = tmp_path / "events"
    log.touch()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(*words) -> None:
        with open(log, "a") as file:
            print(*words, file=file)

    def noted_fsync(number):
        fsync(number)
        note(identity(os.fstat(getattr(number, "fileno", lambda: number)())))

    def noted(real):
        def move(source, target, **options):
            moved = identity(os.stat(source))
            real(source, target, **options)
            note(moved, target)

        return move

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted(rename))
    monkeypatch.setattr(os, "replace", noted(replace))

    def read() -> list[list[str]]:
        return [line.split(" ", 1) for line in log.read_text().splitlines()]

    return read


def identity(status: os.stat_result) -> str:
    """A file, whose inode may have been another's, of another size; a folder."""
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return f"{status.st_ino}:{size}"


def check_synced(path: Path, events: list[list[str]]) -> None:
    """`path` and all in it were synced, then renamed, then the folder it is in was synced."""
    (moved,) = [i for i, event in enumerate(events) if event[1:] == [str(path)]]
    before = {event[0] for event in events[:moved] if len(event) == 1}
    after = {event[0] for event in events[moved:] if len(event) == 1}
    for inside in [path, *path.rglob("*")]:
        assert identity(inside.stat()) in before, f"{inside} was not synced"
    assert identity(path.parent.stat()) in after, f"the name {path} was not synced"


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_checkpoint(build_trainer, events, tmp_path, asynchronous):
    recipe = small_recipe(tmp_path)
    run_dir = tmp_path / "run"
    trainer = build_trainer(
        *recipe, f"run.dir={run_dir}", f"checkpoint.asynchronous={asynchronous}"
    )
    trainer.train_step(next(trainer.data.train_batches(0, 1)))
    trainer.save()
    trainer.saver.wait()
    assert len(list((run_dir / "checkpoint-1").iterdir())) > 4
    check_synced(run_dir / "checkpoint-1", events())
    check_synced(run_dir / "latest", events())


def test_a_dataset(events, tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"c4.0000{number}.json", make_texts(300, seed=number))
    model = train_tokenizer([f"{tmp_path}/c4*"], str(tmp_path / "tokenizer"), 330)
    preprocess([f"{tmp_path}/c4*"], str(tmp_path / "out/c4"), model)
    for name in ("c4_text_document.bin", "c4_text_document.idx", "c4.manifest.json"):
        check_synced(tmp_path / "out" / name, events())
