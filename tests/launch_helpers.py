"""What the tests of the launch scripts share: a tiny run on fixed batches, and its figures."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import ROOT, environment

STEPS = 12


def tiny_overrides(folder: Path, steps: int = STEPS) -> list[str]:
    """Overrides of any recipe that make it a run of seconds on the CPU."""
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(2, 96, (steps, 4, 33)))
    return [
        f"data.fixed_batches={tokens}",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        f"training.steps={steps}",
        "training.seq_length=32",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        "training.precision=fp32",
        "training.log_every=1",
        "model.vocab_size=96",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.ffn_hidden_size=64",
        "run.device=cpu",
    ]


def script_environment(**settings: str | int) -> dict[str, str]:
    """The environment of a launch script: this Python, no GPU."""
    tests_own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    settings = {key: str(value) for key, value in settings.items()}
    return {**environment(), **tests_own, **settings}


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, from the first; each step stands there once."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def wait_until(what: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Return when `what()` is true; fail with `why()` after so many seconds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why()
        time.sleep(0.1)


def is_root() -> bool:
    """Whether this process may make network namespaces and start a Slurm of its own."""
    return os.geteuid() == 0
