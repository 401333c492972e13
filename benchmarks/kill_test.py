#!/usr/bin/env python3
"""Kill a run again and again, and see whether what is left is the run that was never killed.

    python benchmarks/kill_test.py --kills 200 [--forked] [--output FILE.json]

A small model is trained at TP2 and at DP2, with saves at once and in the background, first
undisturbed, then again and again under SIGKILLs: half of them hit a single rank, half the launcher
and all its ranks; at least half come while a save is under way, those evenly on one and on all.
After each, the same command is given again. In the end losses, gradient norms, metrics and every
tensor of the last checkpoint must be the undisturbed run's, to the last bit. Ends with its tally;
exit code 1 if anything differs or there were fewer kills than asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

sys.path.insert(0, str(Path(__file__).parent.parent))
import megatron_ttt.training.trainer  # noqa: F401 (what forked ranks would import)
import pretrain_ttt
from megatron_ttt.checkpoint.run_folder import list_checkpoints
from megatron_ttt.errors import run_command

ROOT = Path(__file__).parent.parent
RECIPE = "yaml_recipes/debug_cpu.yaml"
FORK = multiprocessing.get_context("fork")
STEPS, SAVE_EVERY = 40, 2
TP2 = ["parallel.tensor_model_parallel_size=2"]
BACKGROUND = ["checkpoint.asynchronous=true"]
SETUPS = {
    "TP2": TP2,
    "DP2": [],
    "TP2 background": [*TP2, *BACKGROUND],
    "DP2 background": BACKGROUND,
}


@dataclass
class Run:
    """A training command that is launched until it has finished."""

    overrides: list[str]
    folder: Path
    forked: bool
    kills: Counter = field(default_factory=Counter)
    left: set[Path] = field(default_factory=set)  # temporary folders of runs killed before

    def launch(self):
        """Start it: a Popen of torchrun, or a Process that does as torchrun does."""
        self.left = set(self.folder.glob(".incomplete-*"))
        log = self.folder.with_suffix(".log")
        overrides = [*self.overrides, f"run.dir={self.folder}"]
        if self.forked:
            launcher = FORK.Process(target=launch_forks, args=(overrides, log))
            launcher.start()
            return launcher
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "pretrain_ttt.py", "--config"]
        command += [RECIPE, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(log, "a") as log:
            return Torchrun(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finish(self) -> float:
        """Run to the end undisturbed; the seconds until the first checkpoint it publishes."""
        before, started, seconds = newest_step(self.folder), time.monotonic(), 0.0
        launcher = self.launch()
        while launcher.is_alive():
            if not seconds and newest_step(self.folder) > before:
                seconds = time.monotonic() - started
            time.sleep(0.05)
        if launcher.exitcode:
            log = self.folder.with_suffix(".log").read_text()
            raise SystemExit(f"the run failed:\n{log[-3000:]}")
        return seconds

    def finish_under_fire(self, kills: int, until: float, span: float, chance: random.Random):
        """Kill it until it has ended, or been killed `kills` times, or until that time; then let it
        finish.

        span: a kill at any moment comes in so many seconds from the start.
        """
        while self.kills["in all"] < kills and time.monotonic() < until:
            launcher = self.launch()
            in_save = 2 * self.kills["inside a save"] <= self.kills["in all"]
            if not self.wait_for_moment(launcher, in_save, chance.uniform(0, span), chance):
                break
            # Either kind of moment hits one rank and all of them in turn.
            where = "inside a save" if in_save else "elsewhere"
            alone = self.kills[f"one rank, {where}"] < self.kills[f"whole group, {where}"]
            inside = self.kill(launcher, alone, chance)
            self.kills["in all"] += 1
            self.kills["inside a save"] += inside
            who = "one rank" if alone else "whole group"
            self.kills[who] += 1
            self.kills[f"{who}, {'inside a save' if inside else 'elsewhere'}"] += 1
            print(f"{self.folder.name}: {who}, newest {newest_step(self.folder)}", flush=True)
        else:
            self.finish()
            return
        if launcher.exitcode:
            raise SystemExit(f"the run failed: see {self.folder.with_suffix('.log')}")

    def saving(self) -> bool:
        """Whether a save is under way."""
        return not self.left.issuperset(self.folder.glob(".incomplete-*"))

    def wait_for_moment(self, launcher, in_save: bool, seconds: float, chance) -> bool:
        """Wait for one of the next saves to begin, or so many seconds; False if the run ends
        first."""
        end, begun, awaited = time.monotonic() + seconds, set(), chance.randint(1, 4)
        while launcher.is_alive():
            begun |= set(self.folder.glob(".incomplete-*")) - self.left
            if len(begun) == awaited if in_save else time.monotonic() > end:
                time.sleep(chance.uniform(0, 0.4) if in_save else 0)
                return True
            time.sleep(0.001)
        return False

    def kill(self, launcher, alone: bool, chance: random.Random) -> bool:
        """SIGKILL one rank, whereupon the launcher ends the other; or the launcher and the ranks,
        each of which leads a session of its own. Returns whether a save was under way.

        Background writers are left to themselves: they are what a killed run leaves behind.
        """
        os.kill(launcher.pid, signal.SIGSTOP)
        ranks = psutil.Process(launcher.pid).children()
        if not self.forked:
            ranks = [p for p in ranks if is_rank(p)]
        inside = self.saving()
        if alone and ranks:
            chance.choice(ranks).kill()
            os.kill(launcher.pid, signal.SIGCONT)
        else:
            for process in [*ranks, launcher]:
                process.kill()
        launcher.join()
        return inside


def is_rank(process: psutil.Process) -> bool:
    """Whether a launcher's child trains, and has not just ended."""
    try:
        return "pretrain_ttt.py" in process.cmdline()
    except psutil.ZombieProcess:
        return False


class Torchrun(subprocess.Popen):
    """A launcher with the methods of a multiprocessing.Process."""

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self) -> None:
        self.wait()

    @property
    def exitcode(self) -> int | None:
        return self.returncode


def launch_forks(overrides: list[str], log: Path) -> None:
    """Do as torchrun does: start two ranks; when one ends, end the other, by force in the end.

    They are forks of a process that has imported what a rank imports, which is most of its start.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=run_rank, args=(rank, port, overrides)) for rank in range(2)]
    for process in ranks:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in ranks])
    for process in ranks:
        process.join(timeout=5)
        process.terminate()
        process.join(timeout=30)
        process.kill()
        process.join()
    raise SystemExit(any(process.exitcode for process in ranks))


def run_rank(rank: int, port: int, overrides: list[str]) -> None:
    """What torchrun starts."""
    os.setsid()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
    os.environ.update({key: str(value) for key, value in {**address, "LOCAL_RANK": rank}.items()})
    sys.argv = ["pretrain_ttt.py", "--config", RECIPE, *overrides]
    raise SystemExit(run_command(pretrain_ttt.main))


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((listed.step for listed in list_checkpoints(folder)), default=0)


def figures(folder: Path) -> list[tuple]:
    """What the metrics file says of each step, without times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"], r["tokens"]) for r in records]


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor in a checkpoint, moments included."""
    described = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return {
        name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def differences(one: Path, other: Path) -> list[str]:
    """How the results of two runs differ, in words."""
    found = []
    if figures(one) != figures(other):
        found.append("the metrics differ")
    last, last_other = (list_checkpoints(folder)[-1].path for folder in (one, other))
    if last.name != last_other.name:
        return [*found, f"the last checkpoints are {last.name} and {last_other.name}"]
    ours, theirs = digests(last), digests(last_other)
    found += [f"{name} differs" for name in ours if ours[name] != theirs.get(name)]
    return found


def main() -> int:
    """Run, kill, compare, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600, help="kill no more after that")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--forked",
        action="store_true",
        help="start ranks as forks of this process, not by torchrun",
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    chance, tally = random.Random(arguments.seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        rows = np.random.default_rng(0).integers(2, 96, (arguments.steps, 4, 33))
        np.save(tokens, rows)
        common = [
            f"data.fixed_batches={tokens}",
            "data.train=[]",
            "data.validation=[]",
            "data.tokenizer_model=null",
            f"training.steps={arguments.steps}",
            "training.seq_length=32",
            "training.global_batch_size=4",
            "model.vocab_size=96",
            "parallel.bucket_size=15000",
            f"checkpoint.save_every={SAVE_EVERY}",
            "checkpoint.keep=3",
        ]
        until = time.monotonic() + 60 * arguments.minutes
        shares = [arguments.kills // len(arguments.setups)] * len(arguments.setups)
        shares[0] += arguments.kills - sum(shares)
        for name, kills in zip(arguments.setups, shares):
            folder = Path(scratch) / name.replace(" ", "-")
            whole = Run(
                [*common, *SETUPS[name]], folder.with_name(f"{folder.name}-whole"), arguments.forked
            )
            span = 1.4 * whole.finish()
            counts, found = Counter(), []
            while counts["in all"] < kills and time.monotonic() < until:
                killed = Run(whole.overrides, folder, arguments.forked, counts)
                killed.finish_under_fire(kills, until, span, chance)
                counts["runs"] += 1
                found += differences(whole.folder, folder)
                shutil.rmtree(folder)
            tally[name] = {**counts, "differences": found}
            print(f"{name}: {dict(counts)}, differences: {found or 'none'}", flush=True)
    total = Counter()
    for counts in tally.values():
        total.update({key: count for key, count in counts.items() if key != "differences"})
    bad = [name for name, counts in tally.items() if counts["differences"]]
    print(f"{total['in all']} kills {dict(total)}; runs that differ: {bad or 'none'}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"total": total, **tally}, indent=1) + "\n")
    return bool(bad) or total["in all"] < arguments.kills


if __name__ == "__main__":
    raise SystemExit(main())
