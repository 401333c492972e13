#!/usr/bin/env python3
r"""Time tools/preprocess_c4.py's build against bare SentencePiece on the same text.

    python benchmarks/preprocess.py --input 'c4/c4-train.0000?-of-01024.json.gz' \
        --tokenizer-model tokenizer.model [--rounds 5] [--workers 2] [--output FILE.json]

Bare: `SentencePieceProcessor.encode(list, num_threads=WORKERS)`, the model loaded and the documents
in memory already. The build: the whole command, from the start of Python to the published .bin and
.idx, with SentencePiece and, where it is installed, with gigatoken; each is a new process with new
workers, so their caches are cold. The sides take turns; the ratios are of medians, in wall time and
in CPU time (user and system, all processes). On a machine with other work (see load_average) wall
time favours the side with more processes. The CPU seconds a megabyte of parent and workers, their
start left out, give the hours that C4's English part would take on more cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.shards import find_shards

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_c4.py"


def cpu_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    cpu, started = cpu_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - started, cpu_seconds() - cpu


C4_MEGABYTES = 806_868
"""Text of C4's English part: https://www.tensorflow.org/datasets/catalog/c4."""
CORES = (2, 64, 256)
WHO_WORKED = """if True:
    import atexit, json, resource, runpy, sys
    output, sys.argv = sys.argv[1], sys.argv[2:]

    def tell():
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        with open(output, "w") as file:
            json.dump([usage.ru_utime + usage.ru_stime for usage in usages], file)

    atexit.register(tell)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script; writes the CPU seconds of its process and of those it has waited for."""


def build(inputs: list[str], model: str, backend: str, workers: int) -> list[float]:
    """One build into a new folder; the CPU seconds of the parent and of all workers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", WHO_WORKED, f"{folder}/seconds", TOOL]
        command += ["--input", *inputs, "--output-prefix", f"{folder}/c4"]
        command += ["--tokenizer-model", model, "--tokenizer-backend", backend]
        command += ["--append-eod", "--workers", str(workers)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return json.loads(Path(f"{folder}/seconds").read_text())


def scaling(inputs: list[str], model: str, workers: int, megabytes: float) -> dict:
    """CPU seconds a megabyte of parent and workers, between the first input and all of them, and
    the hours for C4 that follow: of the workers where they are many, of the parent in the end."""
    first = find_shards(inputs)[:workers]
    text = sum(len(t.encode()) for t in read_documents(first, MalformedLines())) / 1e6
    whole = build(inputs, model, "sentencepiece", workers)
    part = build([shard.url for shard in first], model, "sentencepiece", workers)
    parent, worker = ((a - b) / (megabytes - text) for a, b in zip(whole, part))
    hours = {cores: C4_MEGABYTES * max(worker / cores, parent) / 3600 for cores in CORES}
    return {
        "cpu_seconds_a_megabyte": {"parent": round(parent, 6), "worker": round(worker, 6)},
        "c4_hours_by_cores": {str(cores): round(h, 2) for cores, h in hours.items()},
    }


def main() -> None:
    """Take turns, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    texts = list(read_documents(find_shards(args.input), MalformedLines()))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    processor = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
    backends = ["sentencepiece"]
    backends += ["gigatoken"] if importlib.util.find_spec("gigatoken") else []

    sides: dict[str, Callable[[], object]] = {
        "bare": lambda: processor.encode(texts, num_threads=args.workers)
    }
    for backend in backends:
        run = (args.input, args.tokenizer_model, backend, args.workers)
        sides[backend] = functools.partial(build, *run)

    load_before = os.getloadavg()[0]
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, work in sides.items():
            times[side].append(timed(work))

    medians = {
        side: [statistics.median(values) for values in zip(*pairs)] for side, pairs in times.items()
    }
    ratios = {
        f"{backend} {clock}": round(bare / whole, 3)
        for backend in backends
        for clock, bare, whole in zip(("wall", "cpu"), medians["bare"], medians[backend])
    }
    report = {
        "text_megabytes": round(megabytes, 2),
        "documents": len(texts),
        "workers": args.workers,
        "rounds": args.rounds,
        "python": platform.python_version(),
        "load_average": [round(load, 1) for load in (load_before, os.getloadavg()[0])],
        "megabytes_per_second": {
            side: round(megabytes / wall, 2) for side, (wall, _) in medians.items()
        },
        "seconds_wall_cpu": {side: [round(x, 2) for x in pair] for side, pair in medians.items()},
        "ratio_to_bare": ratios,
        **scaling(args.input, args.tokenizer_model, args.workers, megabytes),
    }
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
