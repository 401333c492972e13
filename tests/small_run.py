"""A small run on fixed batches, alone or as two tensor-parallel processes that things happen to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from harness import start
from prefork import ForkedPopen

from megatron_ttt.checkpoint.run_folder import list_checkpoints

STEPS = 8
COMMAND = ["pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml"]


def small_recipe(folder: Path) -> list[str]:
    """Overrides of the run, without validation; it saves at steps 3, 6 and 8."""
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(2, 96, (STEPS, 4, 33)))
    return [
        f"data.fixed_batches={tokens}",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        f"training.steps={STEPS}",
        "training.seq_length=32",
        "training.global_batch_size=4",
        "model.vocab_size=96",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "parallel.bucket_size=5000",
        "checkpoint.save_every=3",
    ]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step in a run's metrics."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints in a run folder."""
    return [listed.step for listed in list_checkpoints(run_dir)]


def begin(recipe: list[str], run_dir: Path, log: Path, *more: str) -> ForkedPopen:
    """Start two tensor-parallel processes."""
    with open(log, "w") as file:
        return start([sys.executable, *command_of(recipe, run_dir, *more)], file, ranks=2)


def begin_torchrun(
    recipe: list[str], run_dir: Path, log: Path, *more: str
) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start two tensor-parallel processes under torchrun; its process, and theirs by rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *command_of(recipe, run_dir, *more)]
    with open(log, "w") as file:
        launcher = start(command, file, forked=False)
    while launcher.poll() is None:
        children = psutil.Process(launcher.pid).children()
        found = {process.environ().get("RANK"): process for process in children}
        if {"0", "1"} <= set(found):
            return launcher, [found["0"], found["1"]]
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


def command_of(recipe: list[str], run_dir: Path, *more: str) -> list[str]:
    """The command of a run at TP2."""
    layout = "parallel.tensor_model_parallel_size=2"
    return [*COMMAND, *recipe, f"run.dir={run_dir}", layout, *more]


def wait_for(log: Path, text: str, run: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until the log of a run holds a text."""
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert run.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
