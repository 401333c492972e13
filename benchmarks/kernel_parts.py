"""One part of `kernels.py`, in a process of its own: what fails on a GPU may take it along.

    python benchmarks/kernel_parts.py PART --until UNIX_SECONDS --output FILE.jsonl [--quick]

Every record is a line of the output as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernel_forms import MINI_BATCH, around_forms, other_forms, scan_flops

from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan

MODELS = {"125m": (12, 64), "350m": (16, 64), "760m": (16, 96), "1b": (32, 64)}  # heads, head_dim
LENGTHS = (2048, 8192, 32768)
BASE_LR = {"linear": 1.0, "mlp": 0.1}
FILL = 384  # batch x heads at 2048 tokens
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
SLOW_SECONDS = 0.3  # what takes longer is timed once

Task = tuple[str, Callable[[], list[dict]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("checked", "around", "kernels", "others", "steps"))
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = Parts(device, quick=arguments.quick)
    with open(arguments.output, "a") as file:
        run(getattr(parts, arguments.part)(), file, arguments.until, device)


def run(tasks: Iterator[Task], file, until: float, device: str) -> None:
    """Do the tasks in time; write down what they give, which fail and which are left out."""

    def write(record: dict) -> None:
        file.write(json.dumps(record) + "\n")
        file.flush()

    for name, task in tasks:
        if time.time() > until:
            write({"left_out": f"{name}: out of time"})
            continue
        try:
            for record in task():
                write(record)
        except Exception:
            write({"failed": name, "why": traceback.format_exc()[-4000:]})
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost to this process


class Parts:
    """Each part gives tasks; quick: tiny shapes, for the tests."""

    def __init__(self, device: str, *, quick: bool):
        self.device, self.quick = device, quick

    def checked(self) -> Iterator[Task]:
        """The scan held to the naive form in float64. Compiling is what takes the time."""
        shapes = {64: (2, 3, 16 * 40 + 5, 64), 96: (1, 3, 16 * 40 + 5, 96)}
        if self.quick:
            shapes = {16: (1, 2, 37, 16)}
        for dtype in BOUNDS:
            for kind in ("linear", "mlp"):
                for head_dim, shape in shapes.items():
                    if head_dim != 96 or dtype == torch.bfloat16:
                        name = f"check, {kind}, {dtype}, head_dim {head_dim}"
                        yield name, partial(self.check, kind, dtype, shape)

    def check(self, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> list[dict]:
        """Relative errors of outputs and gradients; the first call's time."""
        tensors = self.inputs(kind, *shape, dtype)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        results = []
        seconds = []
        for given, backend in ((tensors, "triton"), (exact, "naive")):
            self.synchronise()
            started = time.perf_counter()
            out, final = ttt_scan(INNER_MODELS[kind], *given[:7], tuple(given[7:]), backend=backend)
            if not results:
                upstream = [torch.randn_like(x) for x in (out, *final)]
            ups = [u.to(x.dtype) for u, x in zip(upstream, (out, *final))]
            results.append([out, *final, *torch.autograd.grad([out, *final], given, ups)])
            self.synchronise()
            seconds.append(time.perf_counter() - started)
        errors = [relative(a, b) for a, b in zip(*results)]
        name = str(dtype).removeprefix("torch.")
        print(f"{kind} {name}, head_dim {shape[-1]}: worst relative error {max(errors):.1e}, "
              f"first call {seconds[0]:.1f} s", flush=True)  # fmt: skip
        return [{"part": "checked", "kind": kind, "dtype": name, "head_dim": shape[-1],
                 "error": max(errors), "errors": errors, "bound": BOUNDS[dtype],
                 "first_call_s": seconds[0]}]  # fmt: skip

    def around(self) -> Iterator[Task]:
        """Two ceilings; then what stands round the scan, in its kernels and in PyTorch."""
        yield "ceilings", self.ceilings
        shapes = [(40, 2, 2, 16)] if self.quick else [(2048, 16, H, D) for H, D in MODELS.values()]
        for length, batch, heads, head_dim in shapes:
            compared = around_forms(torch.device(self.device), length, batch, heads, head_dim)
            for what, tensors, forms, passes in compared:
                for form, function in forms.items():
                    # A kernel reads and writes each of its tensors once.
                    moved = passes * tensors[0].nbytes if form == "triton" else None
                    yield (
                        f"{what}, {heads * head_dim} channels, {form}",
                        partial(self.time_around, what, form, function, tensors, moved),
                    )

    def ceilings(self) -> list[dict]:
        """Bytes a second of a device copy (read and written), FLOPs a second of a bf16 product."""
        size = 256 if self.quick else 8192
        a, b = torch.randn(2, size, size, device=self.device).bfloat16()
        copied = torch.empty_like(a)
        for _ in range(1 if self.quick else 200):  # until the clock is up
            torch.matmul(a, b)
        flops = 2 * size**3 / self.seconds(lambda: a @ b)
        copy = 2 * a.nbytes / self.seconds(lambda: copied.copy_(a))
        print(f"copy {copy / 1e9:.1f} GB/s, matrix product {flops / 1e12:.2f} TFLOP/s", flush=True)
        return [{"part": "ceilings", "bytes_per_s": copy, "flops_per_s": flops}]

    def time_around(self, what: str, form: str, function, tensors, moved) -> list[dict]:
        record = self.time(function, tensors)
        both = record["forward_s"] + record["backward_s"]
        length, batch, channels = tensors[0].shape
        record |= {"part": "around", "what": what, "form": form, "channels": channels,
                   "tokens": batch * length}  # fmt: skip
        if moved is not None:
            record["bytes_per_s"] = moved / both
        print(f"{what}, {channels} channels, {form}: {both * 1e3:.3f} ms", flush=True)
        return [record]

    def kernels(self) -> Iterator[Task]:
        """The scan's kernels for every model, beside attention and other libraries' scans."""
        return self.scans(of_kernels=True)

    def others(self) -> Iterator[Task]:
        """The fast PyTorch form and, at 2k tokens, the naive one."""
        return self.scans(of_kernels=False)

    def scans(self, *, of_kernels: bool) -> Iterator[Task]:
        lengths = (48,) if self.quick else LENGTHS
        models = {"tiny": (2, 16)} if self.quick else MODELS
        print(SCAN_HEAD, flush=True)
        for length in lengths:
            for model, (heads, head_dim) in models.items():
                batch = max(1, (2 if self.quick else FILL * LENGTHS[0]) // (heads * length))
                for kind in ("linear", "mlp"):
                    shape = model, kind, batch, heads, length, head_dim
                    tensors = self.inputs(kind, batch, heads, length, head_dim, torch.bfloat16)
                    for form, function in self.forms(kind, length, tensors, of_kernels).items():
                        name = f"{model} {kind}, {length} tokens, {form}"
                        yield name, partial(self.time_scan, shape, form, function, tensors)

    def forms(self, kind: str, length: int, tensors, of_kernels: bool) -> dict:
        def scan(backend):
            return lambda: ttt_scan(
                INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend
            )[0]

        if not of_kernels:
            naive = {"naive": scan("naive")} if self.quick or length == LENGTHS[0] else {}
            return {"torch": scan("torch"), **naive}
        forms = {"triton": scan("triton")}
        q, k, v = tensors[:3]
        if kind == "linear":  # these know no inner MLP
            forms["attention"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
            forms |= other_forms(tensors)
        return forms

    def time_scan(self, shape, form: str, function, tensors) -> list[dict]:
        model, kind, batch, heads, length, head_dim = shape
        record = self.time(function, tensors)
        both, tokens = record["forward_s"] + record["backward_s"], batch * length
        record |= {"part": "timed", "model": model, "kind": kind, "batch": batch, "heads": heads,
                   "length": length, "head_dim": head_dim, "form": form,
                   "tokens_per_s": tokens / both}  # fmt: skip
        if form in ("triton", "torch", "naive"):
            flops = scan_flops(kind, heads * head_dim, head_dim) * tokens
            # q, k, v, output; then those, dout and four gradients' worth: what cannot be avoided.
            traffic = 2 * tokens * heads * head_dim
            record |= {"flops_per_s": 3 * flops / both, "bytes_per_s": 12 * traffic / both}
        print(scan_row(record), flush=True)
        return [record]

    def steps(self) -> Iterator[Task]:
        """Training steps, each with its slowest kernels."""
        from training_step import STEP_HEAD, StepBenchmark, step_row

        benchmark = StepBenchmark(self.device, tiny=self.quick)
        print(STEP_HEAD, flush=True)

        def measure(recipe: str, length: int) -> list[dict]:
            record = {"part": "training_steps", **benchmark.measure(recipe, length)}
            print(step_row(record), flush=True)
            return [record]

        for recipe, length in benchmark.cases:
            yield f"training step, {recipe}, {length} tokens", partial(measure, recipe, length)
        benchmark.close()

    def inputs(self, kind, B, H, L, D, dtype) -> list[torch.Tensor]:
        """As the mixer gives them: tokens [B, H, L, F] views of [L, B, H, F], all else float32."""
        torch.manual_seed(0)
        M = 4 * D
        new = {"device": self.device}
        tensors = [torch.randn(L, B, H, D, **new).to(dtype).permute(1, 2, 0, 3) for _ in range(3)]
        tensors.append(BASE_LR[kind] * torch.rand(B, H, L, **new) / D)
        tensors.append(1 / torch.arange(1, MINI_BATCH + 1, **new))
        tensors += [torch.ones(H, D, **new), torch.zeros(H, D, **new)]
        shapes = [(D, D), (1, D)] if kind == "linear" else [(D, M), (1, M), (M, D), (1, D)]
        tensors += [0.02 * torch.randn(H, *shape, **new) for shape in shapes]
        return [x.requires_grad_() for x in tensors]

    def time(self, function, tensors) -> dict:
        """Medians of a forward and a backward, and the peak memory of both over the start."""
        upstream = [torch.randn_like(out) for out in as_tuple(function())]
        wanted = [x for x in tensors if x.requires_grad]

        def both():
            torch.autograd.grad(as_tuple(function()), wanted, upstream, allow_unused=True)

        both()
        peak = None
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            peak = torch.cuda.max_memory_allocated() - before
        forward, total = self.seconds(function), self.seconds(both)
        return {"forward_s": forward, "backward_s": total - forward, "peak_bytes": peak}

    def seconds(self, function) -> float:
        """Median time of one of some calls that follow each other, so that a GPU is never short of
        work while the host prepares the next; five times, fewer where they are slow. The function
        has run before."""
        first = self.seconds_of(function, 1)
        if self.quick or first > SLOW_SECONDS:
            return first
        calls = max(1, min(50, round(0.02 / first)))
        times, until = [], time.monotonic() + 1
        while len(times) < 3 or (len(times) < 5 and time.monotonic() < until):
            times.append(self.seconds_of(function, calls) / calls)
        return sorted(times)[len(times) // 2]

    def seconds_of(self, function, calls: int) -> float:
        """Of so many calls together."""
        self.synchronise()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm; infinite where that is no number."""
    error = ((a.double() - b).norm() / b.norm()).item()
    return error if math.isfinite(error) else math.inf


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


SCAN_HEAD = (
    "| model | kind | tokens | B x H | form | forward ms | + backward ms | M tokens/s | TFLOP/s "
    "| GB/s | peak MiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def scan_row(record: dict) -> str:
    """Of the table whose head is SCAN_HEAD."""
    peak = record["peak_bytes"]
    rates = [
        f"{record[key] / unit:.2f}" if key in record else "-"
        for key, unit in (("flops_per_s", 1e12), ("bytes_per_s", 1e9))
    ]
    return (
        f"| {record['model']} | {record['kind']} | {record['length']} "
        f"| {record['batch'] * record['heads']} | {record['form']} "
        f"| {record['forward_s'] * 1e3:.3f} "
        f"| {(record['forward_s'] + record['backward_s']) * 1e3:.3f} "
        f"| {record['tokens_per_s'] / 1e6:.3f} | {' | '.join(rates)} "
        f"| {'-' if peak is None else round(peak / 2**20)} |"
    )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a lost device may hang in what Python tidies up
