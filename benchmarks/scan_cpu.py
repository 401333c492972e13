#!/usr/bin/env python3
"""Time the fast scans of a CPU, PyTorch's and C++'s, against the naive one, all in this run.

    python benchmarks/scan_cpu.py [--quick] [--output FILE.json]

Forward and backward, float32, heads of 64, two threads; the three alternate, and the ratio is of
the best of five. On a machine with neighbours two such ratios differ by a tenth and more: there are
several, and their median is the figure. Then the time per token and the peak memory of the fast
ones from 2k to 32k tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import chain, product
from pathlib import Path

import torch

from megatron_ttt.mixers.ttt.cpp.build import unavailable_reason
from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan

HEAD_DIM, MINI_BATCH, BASE_LR = 64, 16, {"linear": 1.0, "mlp": 0.1}
FAST = ("torch", "cpp")
CASES = (("linear", 1, 15), ("mlp", 1, 15), ("linear", 8, 3))  # batch, how many ratios
BEST_OF = 5
REQUIRED = {("linear", 1): 4, ("mlp", 1): 4, ("linear", 8): 12}


def inputs(kind: str, batch: int, heads: int, length: int) -> list[torch.Tensor]:
    """Random inputs of a scan; all require gradients."""
    torch.manual_seed(0)
    F = HEAD_DIM
    tensors = [torch.randn(batch, heads, length, F) for _ in range(3)]
    tensors.append(BASE_LR[kind] * torch.rand(batch, heads, length) / F)
    tensors.append(1 / torch.arange(1, MINI_BATCH + 1))
    tensors += [torch.ones(heads, F), torch.zeros(heads, F)]
    shapes = INNER_MODELS[kind].state_shapes(F).values()
    tensors += [0.02 * torch.randn(heads, *shape) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def seconds(kind: str, tensors: list[torch.Tensor], backend: str) -> float:
    """One forward and backward."""
    started = time.perf_counter()
    out, _ = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    return time.perf_counter() - started


def best_times(kind: str, tensors: list[torch.Tensor]) -> list[float]:
    """Best seconds of the naive form and of each fast one, taken in turns."""
    turns = [[seconds(kind, tensors, form) for form in ("naive", *FAST)] for _ in range(BEST_OF)]
    return list(map(min, zip(*turns)))


def compare(kind: str, batch: int, heads: int, length: int, rounds: int) -> list[dict]:
    """Of each fast form the median of `rounds` ratios, all of them, and the best times of all."""
    tensors = inputs(kind, batch, heads, length)
    naive, *fast = zip(*(best_times(kind, tensors) for _ in range(rounds)))
    records = []
    for form, times in zip(FAST, fast):
        ratios = sorted(n / t for n, t in zip(naive, times))
        ratio = statistics.median(ratios)
        print(
            f"{kind:6} batch {batch}, {heads} heads, {length} tokens: naive {min(naive):.3f} s, "
            f"{form} {min(times):.3f} s, ratio {min(naive) / min(times):.2f}; of {BEST_OF} each "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratio:.2f}",
            flush=True,
        )
        case = {"form": form, "kind": kind, "batch": batch, "heads": heads, "length": length}
        times = {"naive_s": min(naive), "seconds": min(times), "ratio": ratio, "ratios": ratios}
        records.append({**case, **times})
    return records


def long_sequence(form: str, kind: str, length: int, heads: int = 2) -> dict:
    """Time per token and peak memory over the start, in a process of its own."""
    command = [sys.executable, __file__, "--one-length", form, kind, str(length), str(heads)]
    record = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(
        f"{form:5} {kind:6} {length:6} tokens: {record['us_per_token']:.1f} us a token, "
        f"{record['mib']:.0f} MiB",
        flush=True,
    )
    return record


def long_sequences(rounds: int = 7) -> list[dict]:
    """By turns; of each length the record of the median time."""
    cases = list(product(FAST, ("linear", "mlp"), (2048, 8192, 32768)))
    taken = zip(*([long_sequence(*case) for case in cases] for _ in range(rounds)))
    return [sorted(of_case, key=lambda r: r["us_per_token"])[rounds // 2] for of_case in taken]


def one_length(form: str, kind: str, length: int, heads: int) -> dict:
    """What `long_sequence` asks of its process."""
    short = inputs(kind, 1, heads, 1024)
    seconds(kind, short, form)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_kib("VmRSS")
    tensors = inputs(kind, 1, heads, length)
    repeats = 3 * max(32768 // length, 1)
    best = min(seconds(kind, tensors, form) for _ in range(repeats))
    return {
        "form": form,
        "kind": kind,
        "length": length,
        "us_per_token": best / length * 1e6,
        "mib": (resident_kib("VmHWM") - before) / 1024,
    }


def resident_kib(field: str) -> int:
    """This process's resident memory (VmRSS) or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def processor() -> str:
    """Its name and how wide its vectors are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    numbers = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts.get('model name')}, {numbers}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case, for the tests")
    parser.add_argument("--output", type=Path, default="benchmarks/results/scan_cpu.json")
    parser.add_argument("--one-length", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if unavailable_reason() is not None:
        parser.exit(2, f"error: no C++ scan to measure: {unavailable_reason()}\n")
    if arguments.one_length:
        form, kind, length, heads = arguments.one_length
        print(json.dumps(one_length(form, kind, int(length), int(heads))))
        return
    if arguments.quick:
        cases = [compare(kind, 1, 4, 512, 1) for kind in ("linear", "mlp")]
        results = {"compared": list(chain(*cases))}
    else:
        cases = [compare(kind, batch, 12, 2048, rounds) for kind, batch, rounds in CASES]
        results = {
            "compared": list(chain(*cases)),
            "long": long_sequences(),
        }
        for record in results["compared"]:
            record["required"] = REQUIRED[record["kind"], record["batch"]]
    results["machine"] = {"processor": processor(), "torch": torch.__version__}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
