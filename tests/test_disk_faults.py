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
    ("asynchronous=false", 8_000),  # common.pt
    ("asynchronous=false", 400_000),  # one rank's shards
    ("asynchronous=true", 400_000),
    ("asynchronous=true", 840_000),  # .metadata
]


@pytest.mark.parametrize("mode,leave", FULL_AT)
def test_goes_on_when_the_disk_is_full(recipe, whole, small_disk, tmp_path, mode, leave):
    """leave: how many bytes there are for the next checkpoint."""
    run_dir, log = small_disk / "run", tmp_path / "log"
    take_up(whole, run_dir)
    ballast = fill(small_disk, leave)
    launcher = start(recipe, run_dir, log, f"checkpoint.{mode}", "checkpoint.keep=2")
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
