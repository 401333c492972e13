"""Disks that fill up, turn read-only or are slow while a checkpoint is written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run
from small_run import COMMAND, STEPS, losses, small_recipe, start, steps, wait_for

from megatron_ttt.checkpoint.manifest import find_damage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return [*small_recipe(tmp_path_factory.mktemp("tokens")), "checkpoint.save_every=1"]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run of one process that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run([sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}"])
    return run_dir


def mount(*arguments) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "none", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


def check_untouched(run_dir: Path, step: int) -> None:
    """The last good checkpoint is there, nothing else is, and `latest` names it."""
    assert (run_dir / "latest").read_text() == f"checkpoint-{step}\n"
    assert find_damage(run_dir / f"checkpoint-{step}") is None


@pytest.mark.parametrize("leave", [4096, 150_000, 400_000])
@pytest.mark.parametrize("mode", ["asynchronous=false", "asynchronous=true"])
def test_goes_on_when_the_disk_is_full(recipe, whole, small_disk, tmp_path, mode, leave):
    """leave: where in the save it happens."""
    run_dir, log = small_disk / "run", tmp_path / "log"
    more = [f"checkpoint.{mode}", "checkpoint.keep=2"]
    assert start(recipe, run_dir, log, *more, "training.exit_step=2").wait() == 0, log.read_text()
    assert steps(run_dir) == [1, 2]
    ballast = fill(small_disk, leave)
    launcher = start(recipe, run_dir, log, *more)
    wait_for(log, "Warning: ", launcher)
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
