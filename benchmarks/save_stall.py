#!/usr/bin/env python3
r"""How long training stands still for a checkpoint, at a save and at a resume.

    [torchrun --nproc-per-node N] benchmarks/save_stall.py [--pairs 5] [--output FILE.json] \
        [key.path=value ...]

Trains yaml_recipes/ttt_linear_125m.yaml on random tokens, in sequences and batches of a CPU's
size, and saves by turns at once and in the background. The stall of a background save is what
`save` takes and, between later steps, what it takes to publish what was written. Medians, and
their ratio; and what a step takes alone, and where the memory it writes to is a writer's snapshot.
Then what a resume takes: to verify the last checkpoint and to load it, from the page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_ttt.checkpoint.run_folder import checkpoint_name, open_checkpoint
from megatron_ttt.checkpoint.state import load_checkpoint
from megatron_ttt.checkpoint.verification import damage_found_together
from megatron_ttt.checkpoint.writer import CheckpointWriter
from megatron_ttt.config import load_config
from megatron_ttt.process import prepare_process
from megatron_ttt.training.trainer import Trainer

RECIPE = Path(__file__).parent.parent / "yaml_recipes/ttt_linear_125m.yaml"
SEQUENCE = 64


def main() -> None:
    """Train, save, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # One name for all ranks, which have one parent.
    folder = Path(tempfile.gettempdir()) / f"save-stall-{os.getppid()}"
    folder.mkdir(exist_ok=True)
    try:
        figures = measure(folder, arguments.pairs, arguments.overrides)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if int(os.environ.get("RANK", "0")):
        return
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, pairs: int, overrides: list[str]) -> dict:
    """Seconds of stall, by kind of save."""
    random, ranks = np.random.default_rng(0), int(os.environ.get("WORLD_SIZE", "1"))
    np.save(folder / "tokens.npy", random.integers(2, 32000, (1, ranks, SEQUENCE + 1)))
    common = [
        f"data.fixed_batches={folder}/tokens.npy",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        f"training.seq_length={SEQUENCE}",
        f"training.global_batch_size={ranks}",
        "training.micro_batch_size=1",
        f"run.dir={folder}/run",
        "run.device=cpu",
        "checkpoint.keep=1",
    ]
    config = load_config([RECIPE], [*common, *overrides])
    trainer = Trainer(config, prepare_process(config))
    gc.freeze()  # as pretrain_ttt.py does
    batch = next(trainer.data.train_batches(0, 1))
    writers = {
        "at once": CheckpointWriter(),
        "in the background": CheckpointWriter(asynchronous=True),
    }
    stalls = {kind: [] for kind in writers}
    steps = {"alone": [], "first beside a writer": []}
    publishing, size = [], 0
    for number in range(2 * pairs):
        kind = list(writers)[number % 2]
        began = time.perf_counter()
        trainer.train_step(batch)
        steps["alone"].append(time.perf_counter() - began)
        path = trainer.run_dir / checkpoint_name(trainer.step)
        trainer.saver.writer = writers[kind]
        began = time.perf_counter()
        trainer.save()
        stall = time.perf_counter() - began
        writing = time.perf_counter()
        while not path.exists():
            trainer.train_step(batch)
            began = time.perf_counter()
            if writing is not None:
                steps["first beside a writer"].append(began - writing)
                writing = None
            writers[kind].poll()
            if path.exists():
                publishing.append(time.perf_counter() - began)
                stall += publishing[-1]
        stalls[kind].append(stall)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{kind}: {stall:.2f}s", flush=True)
    trainer.saver.wait()
    gc.unfreeze()
    resume = {"verify": [], "load": []}
    checkpoint = open_checkpoint(path)
    for _ in range(3):
        began = time.perf_counter()
        assert damage_found_together(path) is None
        verified = time.perf_counter()
        load_checkpoint(checkpoint, config, trainer.chunks, trainer.optimizer)
        resume["verify"].append(verified - began)
        resume["load"].append(time.perf_counter() - verified)
    medians = {kind: statistics.median(seconds) for kind, seconds in stalls.items()}
    return {
        "checkpoint_gigabytes": round(size / 1e9, 3),
        "stalls": {kind: [round(s, 3) for s in seconds] for kind, seconds in stalls.items()},
        "median": {kind: round(seconds, 3) for kind, seconds in medians.items()},
        "of_it_publishing": round(statistics.median(publishing), 3),
        "ranks": ranks,
        "median_step": {kind: round(statistics.median(s), 3) for kind, s in steps.items()},
        "median_resume": {part: round(statistics.median(s), 3) for part, s in resume.items()},
        "ratio": round(medians["in the background"] / medians["at once"], 4),
    }


if __name__ == "__main__":
    main()
