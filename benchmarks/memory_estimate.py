#!/usr/bin/env python3
"""How far `--dry-run`'s memory estimate is from what a training process takes, on the CPU.

    python benchmarks/memory_estimate.py [--config RECIPE ...] [key.path=value ...]

For each recipe, a process of its own builds the trainer and takes three optimizer steps of one
microbatch of random tokens, in the recipe's precision. Measured is its peak resident memory
(ru_maxrss) less what was resident before the model was built and the code that came in since, which
processes share and whose size is the CPU's affair; saving is not part of it. The sequences are
shorter and fewer than the recipe's unless overrides say otherwise. Prints the table and writes
benchmarks/results/memory_estimate.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "memory_estimate.json"
RECIPES = [f"yaml_recipes/{layer}_125m.yaml" for layer in ("ttt_linear", "ttt_mlp", "transformer")]
SMALLER = ["training.seq_length=1024", "training.micro_batch_size=2"]
STEPS = 3
MIB = 2**20


def main() -> None:
    """Measure each recipe in a process of its own; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", help="recipe (default: the three of 125m)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=SMALLER, metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    if arguments.child:
        print(json.dumps(measure(arguments.config[0], arguments.overrides)))
        return
    results = []
    for recipe in arguments.config or RECIPES:
        command = [sys.executable, __file__, "--child", "--config", recipe, *arguments.overrides]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        print(
            f"{recipe}, {result['micro_batch_size']} x {result['seq_length']} tokens: "
            f"estimated {result['estimated_mib']}, measured {result['measured_mib']} MiB, "
            f"{result['error']:+.1%}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def measure(recipe: str, overrides: list[str]) -> dict:
    """Train `STEPS` steps in this process: the estimated and the measured peak, MiB."""
    import numpy as np
    import torch

    from megatron_ttt.config import load_config
    from megatron_ttt.planning import memory_per_rank
    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.npy"
        config = load_config(
            [recipe],
            [
                *overrides,
                *("run.device=cpu", f"run.dir={folder}/run", f"data.fixed_batches={batches}"),
                *("data.train=[]", "data.validation=[]", "data.tokenizer_model=null"),
            ],
        )
        training = config.training
        training.global_batch_size, training.steps = training.micro_batch_size, STEPS
        shape = STEPS, training.micro_batch_size, training.seq_length + 1
        ids = np.random.default_rng(0).integers(2, config.model.vocab_size, shape)
        np.save(batches, ids)
        platform = prepare_process(config)
        before, code_before = resident_bytes()
        trainer = Trainer(config, platform)
        for step_ids in torch.from_numpy(ids):
            trainer.train_step([step_ids])
    _, code = resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = peak - before - (code - code_before)
    memory = memory_per_rank(config, 1, on_cpu=True)
    estimated = sum(memory.values()) * 2**30
    return {
        "config": recipe,
        "micro_batch_size": training.micro_batch_size,
        "seq_length": training.seq_length,
        "precision": training.precision,
        "estimated_mib": round(estimated / MIB),
        "measured_mib": round(measured / MIB),
        "error": round(estimated / measured - 1, 4),
        "parts_gib": memory,
    }


def resident_bytes() -> tuple[int, int]:
    """What this process has resident now, and what of it are files' pages: code."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return int(resident) * resource.getpagesize(), int(shared) * resource.getpagesize()


if __name__ == "__main__":
    main()
