#!/usr/bin/env python3
"""Time and memory a token of attention over a window, from 2k to 32k tokens.

    python benchmarks/windowed_attention.py [--quick] [--output FILE.json]

Forward and backward, one sequence, grouped heads of 64, window 2048: on a CPU in float32, the CPU
time of one thread, since neighbours may be busy; on a GPU in bfloat16. At 2k tokens the window is
the whole sequence, and a token sees half of it on average. Full attention at 8k for comparison.
Each figure is the median of at least three passes in a process of its own; the cases take turns,
and the medians of five are written to benchmarks/results/windowed_attention_<device>.json. Memory
is the peak over the start: the inputs and their gradients are in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from scan_cpu import processor, resident_kib

from megatron_ttt.ops.windowed_attention import windowed_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, GROUPS, DTYPE = (32, 8, torch.bfloat16) if DEVICE == "cuda" else (4, 2, torch.float32)
HEAD_DIM = 64
WINDOW = 2048
LENGTHS = (2048, 8192, 16384, 32768)
CASES = (*((length, WINDOW) for length in LENGTHS), (8192, None))  # length, window
QUICK_CASES = ((2048, 256), (8192, 256))
ROUNDS = 5
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time
SPREAD = 1.2  # of time and memory a token, from 8k tokens on


def inputs(length: int) -> list[torch.Tensor]:
    """Random q, k, v in the layout that megatron-core has: [length, batch, heads, features]."""
    shapes = ((length, 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS))
    tensors = (torch.randn(shape, dtype=DTYPE, device=DEVICE) for shape in shapes)
    return [x.permute(1, 2, 0, 3).requires_grad_() for x in tensors]


def run_pass(tensors: list[torch.Tensor], window: int | None) -> None:
    """One forward and backward."""
    out = windowed_attention(*tensors, window)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(length: int, window: int | None, passes: int) -> dict:
    """Time and peak memory a token, in this process."""
    run_pass(inputs(min(length, 3072)), window)  # what is made once: kernels, threads, the mask
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident_kib("VmRSS") * 1024
    tensors = inputs(length)
    times = []
    for _ in range(passes):
        started = CLOCK()
        run_pass(tensors, window)
        times.append(CLOCK() - started)
    on_gpu = DEVICE == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_kib("VmHWM") * 1024
    return {
        "us_per_token": statistics.median(times) / length * 1e6,
        "bytes_per_token": (peak - before) / length,
    }


def measure_apart(length: int, window: int | None) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(length), str(window or 0)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def summarise(length: int, window: int | None, rounds: list[dict]) -> dict:
    """The medians of a case; prints them."""
    times = sorted(record["us_per_token"] for record in rounds)
    memory = statistics.median(record["bytes_per_token"] for record in rounds)
    record = {
        "length": length,
        "window": window,
        "us_per_token": statistics.median(times),
        "us_per_token_of_rounds": times,
        "bytes_per_token": memory,
    }
    print(
        f"{length:6} tokens, window {window}: {record['us_per_token']:.2f} us a token "
        f"({times[0]:.2f} to {times[-1]:.2f}), peak {memory / 1024:.1f} KiB a token",
        flush=True,
    )
    return record


def spread(records: list[dict], field: str) -> float:
    """Largest over smallest figure of the windowed cases from 8k tokens on."""
    figures = [r[field] for r in records if r["window"] and r["length"] >= 8192]
    return max(figures) / min(figures)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case, for the tests")
    default = Path(f"benchmarks/results/windowed_attention_{DEVICE}.json")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        length, window = arguments.one
        print(json.dumps(measure(length, window or None, max(LENGTHS[-1] // length, 3))))
        return
    if arguments.quick:
        taken = {case: [measure(*case, passes=3)] for case in QUICK_CASES}
    else:
        turns = [[measure_apart(*case) for case in CASES] for _ in range(ROUNDS)]
        taken = dict(zip(CASES, zip(*turns)))
    records = [summarise(*case, rounds) for case, rounds in taken.items()]
    results = {"cases": records}
    if not arguments.quick:
        fields = ("us_per_token", "bytes_per_token")
        results["spread_from_8k"] = {field: spread(records, field) for field in fields}
        results["spread_allowed"] = SPREAD
        print(results["spread_from_8k"])
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    results["setting"] = {
        "device": name,
        "torch": torch.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "heads": HEADS,
        "groups": GROUPS,
        "head_dim": HEAD_DIM,
        "threads": torch.get_num_threads(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
