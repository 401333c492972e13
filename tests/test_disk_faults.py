"""Disks that fill up, turn read-only or are slow while a checkpoint is written."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import run
from small_run import COMMAND, STEPS, begin, losses, small_recipe, steps, wait_for

from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.writer import Checks
from megatron_ttt.errors import TrainingError
from megatron_ttt.platform.mcore_workarounds.saving import ResultsFile, _of_the_disk
from megatron_ttt.training import saving
from megatron_ttt.training.loggers import JsonLines
from megatron_ttt.training.metrics import MetricsLog


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return [*small_recipe(tmp_path_factory.mktemp("tokens")), "checkpoint.save_every=1"]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run of one process that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run([sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}", "checkpoint.keep=0"])
    return run_dir


def mount(*arguments) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "none", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


def take_up(whole: Path, run_dir: Path) -> None:
    """A run folder as `whole` was after its second step."""
    run_dir.mkdir()
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(whole / name, run_dir / name)
    shutil.copy(whole / "metrics.jsonl", run_dir)
    (run_dir / "latest").write_text("checkpoint-2\n")


def check_untouched(run_dir: Path, step: int) -> None:
    """The last good checkpoint is there, nothing else is, and `latest` names it."""
    assert (run_dir / "latest").read_text() == f"checkpoint-{step}\n"
    assert find_damage(run_dir / f"checkpoint-{step}") is None


FULL_AT = [
    ("asynchronous=true", 400_000),  # one rank's shards
    ("asynchronous=false", 400_000),
    ("asynchronous=false", 13_000),  # common.pt, after the run's lock and config.yaml
    ("asynchronous=true", 840_000),  # .metadata
]


@pytest.mark.disk
@pytest.mark.parametrize("mode,leave", FULL_AT)
def test_goes_on_when_the_disk_is_full(recipe, whole, small_disk, tmp_path, mode, leave):
    """leave: how many bytes there are for the next checkpoint."""
    run_dir, log = small_disk / "run", tmp_path / "log"
    take_up(whole, run_dir)
    ballast = fill(small_disk, leave)
    launcher = begin(recipe, run_dir, log, f"checkpoint.{mode}", "checkpoint.keep=2")
    wait_for(log, "checkpoint-3 was not saved (rank ", launcher)
    # Nothing was removed for a checkpoint that did not come, nor did it leave anything.
    assert steps(run_dir)[:2] == [1, 2]
    ballast.unlink()
    assert launcher.wait() == 0, log.read_text()[-3000:]
    assert "No space left" in log.read_text() or "failed" in log.read_text()
    assert "Traceback" not in log.read_text()
    check_untouched(run_dir, STEPS)
    assert not list(run_dir.glob(".*"))
    assert len(losses(run_dir)) == STEPS


@pytest.fixture
def build(build_trainer, recipe):
    """A trainer in this process, from overrides."""
    return partial(build_trainer, *recipe)


@pytest.mark.parametrize("mode", ["asynchronous=false", "asynchronous=true"])
def test_stops_when_told_to(build, whole, small_disk, mode):
    run_dir = small_disk / "run"
    take_up(whole, run_dir)
    trainer = build(f"run.dir={run_dir}", "checkpoint.on_save_error=stop", f"checkpoint.{mode}")
    fill(small_disk, 400_000)
    with pytest.raises(
        TrainingError, match=r"checkpoint-3 was not saved \(rank 0: .*No space left"
    ):
        trainer.train()
    check_untouched(run_dir, 2)
    assert steps(run_dir) == [1, 2] and not list(run_dir.glob(".*"))
    assert trainer.step < STEPS


class FullAfter(io.RawIOBase):
    """A file on a disk with room for so many bytes."""

    def __init__(self, room: int):
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(content)
        return len(content)


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_the_disk_s_own_words_are_said(room):
    """torch says "unexpected pos" where it cannot end a file whose content found no room."""
    with pytest.raises((OSError, RuntimeError)) as failure:
        torch.save(torch.zeros(10_000), FullAfter(room))
    assert _of_the_disk(failure.value).errno == errno.ENOSPC
    assert _of_the_disk(other := ValueError("another")) is other


def test_a_last_checkpoint_that_was_not_saved_is_no_success(build, whole, small_disk, capsys):
    run_dir = small_disk / "run"
    take_up(whole, run_dir)
    trainer = build(f"run.dir={run_dir}", "checkpoint.keep=1")
    fill(small_disk, 400_000)
    with pytest.raises(TrainingError, match="the last checkpoint, of step 8, was not saved"):
        trainer.train()
    assert capsys.readouterr().out.count("was not saved") == STEPS - 2
    check_untouched(run_dir, 2)
    assert steps(run_dir) == [1, 2]


def test_goes_on_when_the_disk_is_read_only(build, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    take_up(whole, run_dir)
    trainer = build(f"run.dir={run_dir}")
    batches = trainer.data.train_batches(2, STEPS)
    trainer.train_step(next(batches))
    mount("--bind", run_dir, run_dir)
    try:
        mount("-o", "remount,ro,bind", run_dir)
        trainer.save()
        said = capsys.readouterr().out
        assert "checkpoint-3 was not saved (rank 0: [Errno 30] Read-only file system" in said
        check_untouched(run_dir, 2)
    finally:
        subprocess.run(["umount", "-l", run_dir], check=True)
    trainer.train_step(next(batches))
    trainer.save()
    assert trainer.saver.failure is None and steps(run_dir)[-1] == 4


def test_metrics_wait_for_room(build, whole, small_disk, capsys):
    run_dir = small_disk / "run"
    take_up(whole, run_dir)
    trainer = build(f"run.dir={run_dir}")
    log = MetricsLog(trainer.config, trainer.platform)
    log.on_train_start(trainer)
    assert len(log_lines(run_dir)) == 2
    ballast = fill(small_disk, 0)
    for trainer.step in range(3, 60):
        log.on_step_end(trainer, {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0}, [])
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written: No space left") == 1
    ballast.unlink()
    log.on_train_end(trainer, None)
    assert [step for step, _, _ in losses(run_dir)] == list(range(1, 60))


def log_lines(run_dir: Path) -> list[bytes]:
    return (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def test_metrics_wait_for_a_file_server(tmp_path, monkeypatch, capsys):
    """Which may say only at an fsync that it is full."""
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda number: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        log.write({"step": 1})
        log.flush()
    log.close(failed=False)
    assert "metrics.jsonl may be lost: No space left on device" in capsys.readouterr().out


def test_what_a_writer_found_needs_no_disk(small_disk, monkeypatch):
    fill(small_disk, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    results = ResultsFile()
    results.put(["found"] * 10_000)
    assert results.get_nowait() == ["found"] * 10_000


def test_a_slow_disk_is_told(build, tmp_path, monkeypatch, capsys):
    from megatron_ttt.checkpoint import manifest

    monkeypatch.setattr(saving, "SLOW_SAVE_SECONDS", 0.5)
    fsync = os.fsync
    monkeypatch.setattr(manifest.os, "fsync", lambda file: (time.sleep(0.5), fsync(file)))
    trainer = build(f"run.dir={tmp_path}/run")
    trainer.saver.saved_at = time.perf_counter()
    trainer.save()
    assert "the disk is slow, or checkpoint.save_every small" in capsys.readouterr().out


def test_old_checkpoints_go_behind_training(build, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    trainer = build(f"run.dir={run_dir}", "checkpoint.keep=1")
    batches = trainer.data.train_batches(0, STEPS)
    go, rmtree = threading.Event(), shutil.rmtree

    def slow(path, **options):
        if not options:  # in the background
            go.wait(60)
        rmtree(path, **options)

    trainer.train_step(next(batches))
    trainer.save()
    monkeypatch.setattr(saving.shutil, "rmtree", slow)
    trainer.train_step(next(batches))
    trainer.save()
    assert steps(run_dir) == [2] and (run_dir / ".removed-checkpoint-1").is_dir()
    monkeypatch.setattr(saving.shutil, "rmtree", rmtree)
    threading.Timer(0.2, go.set).start()
    trainer.train_step(next(batches))
    trainer.save()  # waits for the room of the first
    assert not (run_dir / ".removed-checkpoint-1").exists()
    trainer.saver.wait()
    assert steps(run_dir) == [3] and not list(run_dir.glob(".*"))


def save_behind(monkeypatch, trainer, look) -> None:
    """Save in the background, in whose process the checks are computed; give it a minute."""
    checks = Checks(look, lambda seen: {"seen": seen})
    monkeypatch.setattr(saving, "save_checks", lambda *arguments: checks)
    trainer.save()
    (process,) = multiprocessing.active_children()
    process.join(60)
    process.kill()
    trainer.saver.wait()


def test_a_writer_in_the_background_has_no_threads_to_wait_for(build, tmp_path, monkeypatch):
    """OpenMP's threads are not in a fork; what needs them would wait for ever."""
    trainer = build(f"run.dir={tmp_path}/run", "checkpoint.asynchronous=true")
    threads, many = torch.get_num_threads(), torch.ones(1 << 22)
    torch.set_num_threads(2)
    try:
        many.sum()
        save_behind(monkeypatch, trainer, lambda: int(many.sum()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    state = json.loads((tmp_path / "run/checkpoint-0/state.json").read_text())
    assert state["seen"] == 1 << 22


def test_a_writer_in_the_background_that_is_killed(build, tmp_path, capsys, monkeypatch):
    trainer = build(f"run.dir={tmp_path}/run", "checkpoint.asynchronous=true")
    save_behind(monkeypatch, trainer, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "checkpoint-0 was not saved (rank 0: " in capsys.readouterr().out
    assert list((tmp_path / "run").iterdir()) == []
