"""A signal in every phase of a run, a rank that hangs, a launcher that is killed."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from data.data_helpers import write_pair
from harness import ROOT, start
from small_run import (
    COMMAND,
    STEPS,
    begin,
    begin_torchrun,
    losses,
    small_recipe,
    steps,
    wait_for,
)

from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.data.tokenizer_training import train_tokenizer

GRACE = 90
"""Seconds from the signal to the end; a cluster manager gives 30 to a machine of its own."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return small_recipe(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> list[str]:
    """Overrides for packed tokens with indices to build, and a validation that takes its time."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text}) for text in (ROOT / "LICENSE").read_text().split("\n\n")]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([str(folder / "text.jsonl")], str(folder / "tokenizer"), 340)
    documents = np.random.default_rng(0).integers(1, 340, (2000, 50))
    prefix = write_pair(folder / "text", list(documents))
    return [
        "data.fixed_batches=null",
        f"data.train={prefix}",
        f"data.validation={prefix}",
        f"data.tokenizer_model={folder}/tokenizer.model",
        "checkpoint.export_final=false",
        "model.vocab_size=352",
        "training.eval_every=1",
        "training.eval_batches=200",
    ]


def wait_until(holds, launcher) -> None:
    end = time.monotonic() + 240
    while not holds():
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.002)


def heeds_sigterm(process: psutil.Process) -> bool:
    """Whether the process has a handler for SIGTERM by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(
        next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16
    )
    return bool(caught >> (signal.SIGTERM - 1) & 1)


PHASES = ["start-up", "index building", "evaluation", "save", "background save"]


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_every_phase(recipe, indexed, tmp_path, phase):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = indexed if phase in ("index building", "evaluation") else []
    more = [*more, f"checkpoint.asynchronous={str(phase == 'background save').lower()}"]
    launcher = begin(recipe, run_dir, log, *more)
    processes = [psutil.Process(pid) for pid in launcher.pids]
    if phase == "start-up":
        wait_until(lambda: all(map(heeds_sigterm, processes)), launcher)
    elif phase == "index building":
        wait_until((run_dir / "cache").exists, launcher)
    elif phase == "evaluation":
        wait_for(log, "Step 1:", launcher)
    else:
        wait_until(lambda: list(run_dir.glob(".incomplete-checkpoint-3.*")), launcher)
    random.Random(phase).choice(processes).terminate()
    saving = bool(list(run_dir.glob(".incomplete-checkpoint-3.*")))
    assert "Validation at step 1" not in log.read_text()
    assert launcher.wait(timeout=GRACE) == 75
    output = log.read_text()
    assert "SIGTERM was received. The same command goes on" in output, output[-3000:]
    saved = steps(run_dir)
    if phase in ("start-up", "index building"):
        assert saved == [] and losses(run_dir) == [] and "Stopped at step 0 of" in output
        return
    stopped_at = losses(run_dir)[-1][0]
    assert saved[-1] == stopped_at and f"Stopped at step {stopped_at} of" in output
    if phase == "evaluation":
        assert saved == [1]
    elif saving:  # else this process was held up while the save went on
        # At once after that save; a step later if training went on by then.
        assert saved in ([3], [3, 4])
    assert all(find_damage(run_dir / f"checkpoint-{step}") is None for step in saved)
    assert not list(run_dir.glob(".*"))


def test_sigterm_to_the_whole_process_group(recipe, indexed, tmp_path):
    """As launchers send it: the processes that read ahead end with the run, not before."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, *COMMAND, *recipe, *indexed, f"run.dir={run_dir}"]
    command += ["data.num_workers=1", "data.validation=[]", "training.steps=100000"]
    with open(log, "w") as file:
        process = start(["setsid", *command], file)
    wait_for(log, "Step 1:", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=GRACE) == 75, log.read_text()[-3000:]
    assert steps(run_dir)[-1] == losses(run_dir)[-1][0]


@pytest.mark.kills
def test_a_rank_that_hangs_is_named(recipe, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher, (_, hanging) = begin_torchrun(recipe, run_dir, log, "run.timeout_minutes=0.5")
    wait_for(log, "Step 2:", launcher)
    hanging.suspend()
    try:
        wait_for(log, "error: ", launcher)
    finally:
        hanging.kill()
    assert launcher.wait(timeout=GRACE) == 1
    output = log.read_text()
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 0 at step ") and ": no answer from rank 1 (" in line
    # At the earliest where step 2, having been logged, asks the ranks whether to stop.
    assert int(line.split()[5].rstrip(",")) in range(2, STEPS + 1)
    assert f'Traceback (most recent call last):\n  File "{ROOT}' not in output
    assert "Timed out waiting" in line


def test_a_rank_that_crashes_says_where(recipe, tmp_path):
    log = tmp_path / "log"
    run = begin(recipe, tmp_path / "run", log)
    wait_for(log, "Step 2:", run)
    os.kill(run.pids[1], signal.SIGSEGV)
    assert run.wait(timeout=GRACE) == -signal.SIGSEGV
    output = log.read_text()
    _, where = output.split("Fatal Python error: Segmentation fault")
    assert f'File "{ROOT}/pretrain_ttt.py", line ' in where


@pytest.mark.kills
def test_ranks_whose_launcher_was_killed_save_and_leave(recipe, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher, processes = begin_torchrun(recipe, run_dir, log)
    wait_for(log, "Step 1:", launcher)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(processes, timeout=GRACE)
    assert not alive
    assert "the launcher was killed. The same command goes on" in log.read_text()
    stopped_at = losses(run_dir)[-1][0]
    assert stopped_at < STEPS and steps(run_dir)[-1] == stopped_at
    assert find_damage(run_dir / f"checkpoint-{stopped_at}") is None
