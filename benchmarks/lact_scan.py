#!/usr/bin/env python3
"""Time of the LaCT scan over that of its matrix products alone, and memory by length.

    python benchmarks/lact_scan.py [--output FILE.json]

Forward and backward. The products are those of the scan and of its recomputation, as bare
`torch.bmm` of the same shapes and dtype: 18 FLOPs a token and fast weight three times, and the
forward pass once more. On a CPU small sizes in float32 with one thread, on a GPU those of the 760M
model in bfloat16. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

import torch
from scan_cpu import processor

from megatron_ttt.mixers.lact.scan import lact_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH, CHUNK, LENGTHS, DTYPE = (
    (4, 384, 2048, (8192, 32768), torch.bfloat16)
    if DEVICE == "cuda"
    else (2, 256, 512, (2048, 4096), torch.float32)
)
ROUNDS = 3
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time  # neighbours may be busy


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function) -> float:
    """The median time of a call, after one that warms up."""
    function()
    times = []
    for _ in range(ROUNDS):
        synchronize()
        started = CLOCK()
        function()
        synchronize()
        times.append(CLOCK() - started)
    return statistics.median(times)


def scan_pass(length: int, muon: bool):
    """Return a forward and backward pass of the scan."""
    q, k, v = (
        torch.randn(1, HEADS, length, WIDTH, device=DEVICE, dtype=DTYPE).requires_grad_()
        for _ in range(3)
    )
    lr = torch.full((1, HEADS, length, 3), 1e-3, device=DEVICE).requires_grad_()
    beta = torch.full((1, HEADS, length), 0.5, device=DEVICE).requires_grad_()
    weights = [torch.randn(HEADS, WIDTH, WIDTH, device=DEVICE) / WIDTH**0.5 for _ in range(3)]
    weights = tuple(w.requires_grad_() for w in weights)
    inputs = (q, k, v, lr, beta, *weights)

    def run():
        out = lact_scan(q, k, v, lr, beta, weights, chunk_size=CHUNK, muon=muon)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def bare_products(length: int):
    """Return the matrix products of a pass, without Muon's: nine of [C, F] x [F, F] a chunk
    forward, three of the last one, which is not learned from; four times."""
    tokens = torch.randn(HEADS, CHUNK, WIDTH, device=DEVICE, dtype=DTYPE)
    double = torch.randn(HEADS, CHUNK, 2 * WIDTH, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(HEADS, WIDTH, WIDTH, device=DEVICE, dtype=DTYPE)
    wide = torch.randn(HEADS, WIDTH, 2 * WIDTH, device=DEVICE, dtype=DTYPE)

    def run():
        chunks = length // CHUNK
        for _ in range(4 * chunks):
            torch.bmm(tokens, wide), torch.bmm(tokens, weight)  # of queries
        for _ in range(4 * (chunks - 1)):
            torch.bmm(tokens, wide), torch.bmm(tokens, weight)  # of keys and values
            torch.bmm(double.mT, tokens), torch.bmm(tokens.mT, tokens)  # steps

    return run


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / f"results/lact_scan_{DEVICE}.json"
    parser.add_argument("--output", type=Path, default=default)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    records = []
    for length, muon in product(LENGTHS, (False, True)):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        scan, bare = seconds(scan_pass(length, muon)), seconds(bare_products(length))
        record = {"length": length, "muon": muon, "scan_s": scan, "products_s": bare}
        record["ratio"] = scan / bare
        if DEVICE == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(record, flush=True)
        records.append(record)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    sizes = {"heads": HEADS, "width": WIDTH, "chunk": CHUNK, "dtype": str(DTYPE)}
    tree = {"device": device, "torch": torch.__version__, **sizes, "cases": records}
    output.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
