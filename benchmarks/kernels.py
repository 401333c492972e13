#!/usr/bin/env python3
"""Test, time and profile the Triton kernels on one GPU, within 8 minutes and offline.

    python benchmarks/kernels.py [--quick] [--minutes 8] [--output FILE.json]

In this order, each in processes of its own, what is over time being left out and listed:

- the kernels' tests (pytest), compiled; beside them the scan held to the naive form in float64;
- two ceilings, a device copy and a large matrix product; the kernels round the scan beside plain
  PyTorch;
- the scan's kernels, forward and forward + backward, for the four models' heads at 2k, 8k and 32k
  tokens, beside causal scaled_dot_product_attention of the same shape; flash-linear-attention's
  chunk_ttt_linear, gated delta rule and Mamba-2's scan where they can be imported. Bytes and FLOPs
  a second stand beside the ceilings;
- training steps of the recipes: tokens/s and MFU, TTT beside Transformer at 2k, 8k and 32k tokens,
  and the slowest kernels of each;
- the same shapes in the fast PyTorch form and the naive one.

The JSON is written after each part. Exit code 1 where a test or a check fails or was not finished.
Without a GPU: one line and exit code 2. --quick takes tiny shapes, and with TRITON_INTERPRET=1 also
runs, for the tests, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PARTS = {"around": 0.5, "kernels": 0.65, "steps": 0.9, "others": 1.0}
"""When each is over at the latest, as a share of the minutes."""
SHARE_OF_TESTS = 0.4
GRACE_SECONDS = 10  # for a part to finish what it is at
TAIL = 8000  # characters kept of a process's output
WANTED = ("pytest", "megatron.core", "omegaconf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for the tests")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    arguments = parser.parse_args()
    interpreted = arguments.quick and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        print(
            "benchmarks/kernels.py: no CUDA device: run it on a machine with a GPU", file=sys.stderr
        )
        sys.exit(2)
    name = "interpreter" if interpreted else torch.cuda.get_device_name()
    default = ROOT / f"benchmarks/results/{name.lower().replace(' ', '_')}.json"
    with tempfile.TemporaryDirectory() as scratch:
        Benchmark(name, arguments, arguments.output or default, Path(scratch)).run()


class Process:
    """A process whose output goes to a file, from which it can be read at any time."""

    def __init__(self, name: str, command: list, scratch: Path):
        self.name, self.log = name, scratch / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def wait(self, until: float) -> int | None:
        """Its exit code; None where it was over time, and was ended with what it has started."""
        try:
            return self.process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL:]


class Benchmark:
    def __init__(self, device: str, arguments: argparse.Namespace, output: Path, scratch: Path):
        self.quick, self.output, self.scratch = arguments.quick, output, scratch
        self.started, self.seconds = time.time(), 60 * arguments.minutes
        self.result = {"device": device, "torch": torch.__version__, "left_out": [], "failed": [],
                       "tests": [], "checked": [], "ceilings": [], "around": [], "timed": [],
                       "training_steps": []}  # fmt: skip
        self.wrong: list[str] = []

    def run(self) -> None:
        for package in WANTED:
            if missing(package):
                self.leave_out(f"{package} is not installed: its part will be missing")
        self.tests_and_checks()
        for part in PARTS:
            if part != "steps" or not any(map(missing, WANTED[1:])):
                self.finish(part, self.start(part, PARTS[part]), PARTS[part])
        for failure in self.result["failed"]:
            print(f"failed: {failure['failed']}: {failure['why'].strip().splitlines()[-1]}")
        if self.wrong:
            sys.exit(f"the kernels are wrong, or not all was tried: {', '.join(self.wrong)}")

    def tests_and_checks(self) -> None:
        """Side by side: it is compiling that takes the time, one core a process."""
        groups = {
            "scan, linear": ["tests/ops/test_triton.py", "-k", "linear"],
            "scan, mlp": ["tests/ops/test_triton.py", "-k", "not linear"],
            "round the scan": ["tests/ops/test_fused.py"],
        }
        if self.quick:
            groups = {"quick": ["tests/ops/test_fused.py", "-k", "for_cuda"]}
        if missing("pytest"):
            groups = {}
        pytest = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        running = {
            group: Process(f"tests, {group}", [*pytest, *arguments], self.scratch)
            for group, arguments in groups.items()
        }
        checks = self.start("checked", SHARE_OF_TESTS)
        for group, process in running.items():
            code = process.wait(self.ends(SHARE_OF_TESTS))
            output = process.output()
            last = (output.strip().splitlines() or ["no output"])[-1]
            summary = "out of time" if code is None else re.sub(r" in [\d.]+s.*", "", last)
            self.result["tests"].append({"part": group, "summary": summary, "exit_code": code})
            print(f"tests, {group}: {summary}", flush=True)
            if code != 0:
                self.wrong.append(process.name)
                self.result["tests"][-1]["output"] = output
                print(output, flush=True)
        self.finish("checked", checks, SHARE_OF_TESTS)
        checked = self.result["checked"]
        wrong = [c for c in checked if not c["error"] <= c["bound"]]  # NaN is not
        self.wrong += [f"{c['kind']} {c['dtype']}: {c['error']:.1e}" for c in wrong]
        self.wrong += [] if checked else ["nothing was checked"]

    def ends(self, share: float) -> float:
        return self.started + share * self.seconds

    def records_of(self, part: str) -> Path:
        return self.scratch / f"{part}.jsonl"

    def start(self, part: str, share: float) -> Process:
        command = [ROOT / "benchmarks/kernel_parts.py", part, "--until", self.ends(share)]
        command += ["--output", self.records_of(part), *(["--quick"] if self.quick else [])]
        return Process(part, command, self.scratch)

    def finish(self, part: str, process: Process, share: float) -> None:
        """Take a part's records, whatever became of it, and write down what there is by now."""
        code = process.wait(self.ends(share) + GRACE_SECONDS)
        print(process.output(), flush=True)
        path = self.records_of(part)
        for line in path.read_text().splitlines() if path.exists() else []:
            record = json.loads(line)
            if "left_out" in record:
                self.leave_out(record["left_out"])
            elif "failed" in record:
                self.fail(part, record)
            else:
                self.result[record.pop("part")].append(record)
        if code is None:
            self.leave_out(f"the rest of {part}: out of time")
        elif code:
            self.fail(part, {"failed": part, "why": process.output() or f"exit code {code}"})
        if code is None and part == "checked":
            self.wrong.append("the checks were not finished")
        self.result["seconds"] = time.time() - self.started
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.result, indent=1) + "\n")

    def leave_out(self, what: str) -> None:
        self.result["left_out"].append(what)
        print(f"left out: {what}", flush=True)

    def fail(self, part: str, record: dict) -> None:
        """Note a failure; the benchmark's too where it is of a check."""
        self.result["failed"].append(record)
        if part == "checked":
            self.wrong.append(record["failed"])


def missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # of the package it is in
        return True


if __name__ == "__main__":
    main()
