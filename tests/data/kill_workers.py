#!/usr/bin/env python3
"""Kill one worker of the preprocessing, or press Ctrl-C, at random moments, from the start-up on.

    python tests/data/kill_workers.py --kills 50 --interrupts 50 [--workers 2] [--seed 0]

Every run must end, with one line and the right exit code, and take its workers with it; the next
run gives the bytes of the run that nobody disturbed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from data_helpers import make_texts, pair, write_shard

from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.tokenizer_training import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_c4.py"
HUNG_SECONDS = 60


def disturb(folder: Path, kills: int, interrupts: int, workers: int, seed: int) -> dict[str, int]:
    """Disturb `kills` + `interrupts` runs; how often each thing ended in which exit code, and the
    longest time, in seconds, from the signal to the end of the run."""
    texts = make_texts(1500, seed=0)
    for i in range(12):
        write_shard(folder / f"c4-train.{i:05d}.json.gz", texts[i:])
    model = train_tokenizer([f"{folder}/c4-train.00000*"], str(folder / "tokenizer"), 330)
    output = folder / "output" / "c4"
    run = ([f"{folder}/c4-train.*"], str(output), model)
    command = [sys.executable, str(TOOL), "--input", *run[0], "--workers", str(workers)]
    command += ["--output-prefix", run[1], "--tokenizer-model", str(model)]
    process = start(command)
    whole, at_work = watch(process)
    expected = pair(f"{output}_text_document")
    rng, tally, slowest = random.Random(seed), Counter(), 0.0
    left = ["kill"] * kills + ["interrupt"] * interrupts
    while left:
        shutil.rmtree(output.parent)
        process = start(command)
        what = left[-1]
        if what == "kill":
            while process.poll() is None and not find_workers(process.pid):
                time.sleep(0.002)
        time.sleep(rng.uniform(0, at_work if what == "kill" else whole))
        victims = hit(process, what, rng)
        begun = time.perf_counter()
        try:
            _, errors = process.communicate(timeout=HUNG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{what}: the run hangs") from None
        if process.returncode:  # else it had done its work before it was hit: once more
            slowest = max(slowest, time.perf_counter() - begun)
            left.pop()
        check_end(what, process.returncode, errors)
        for victim in victims:
            victim.wait(HUNG_SECONDS)
        tally[f"{what}: exit code {process.returncode}"] += 1
        with contextlib.redirect_stderr(io.StringIO()):
            preprocess(*run)
        assert pair(f"{output}_text_document") == expected
    return {**tally, "slowest_end_seconds": round(slowest, 2)}


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def watch(process: subprocess.Popen) -> tuple[float, float]:
    """The seconds that an undisturbed run takes, and those for which it has workers."""
    begun, first = time.perf_counter(), 0.0
    while process.poll() is None:
        if not first and find_workers(process.pid):
            first = time.perf_counter()
        time.sleep(0.002)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.perf_counter() - begun, time.perf_counter() - first


def hit(process: subprocess.Popen, what: str, rng: random.Random) -> list[psutil.Process]:
    """Kill a worker, or interrupt every process; the workers there were."""
    workers = find_workers(process.pid)
    if what == "interrupt" and process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    elif workers:
        rng.choice(workers).kill()
    return workers


def find_workers(parent: int) -> list[psutil.Process]:
    found = []
    try:
        for child in psutil.Process(parent).children():
            if any("spawn_main" in argument for argument in child.cmdline()):
                found.append(child)
    except psutil.NoSuchProcess:
        pass
    return found


def check_end(what: str, code: int, errors: str) -> None:
    """One line says what happened; a run that had ended before it was hit is none of ours. Python
    itself dies of a SIGINT that comes before the first line of the tool."""
    assert "Traceback" not in errors or code == -signal.SIGINT, errors
    last = errors.splitlines()[-1] if errors else ""
    if what == "kill" and code:
        assert code == 2, (code, errors)
        assert last.startswith("error: a worker process died"), errors
    elif code not in (0, -signal.SIGINT):
        assert code == 128 + signal.SIGINT, (code, errors)
        assert last.startswith("stopped by SIGINT; the same command goes on from here"), errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = disturb(Path(folder), args.kills, args.interrupts, args.workers, args.seed)
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
