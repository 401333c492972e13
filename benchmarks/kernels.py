#!/usr/bin/env python3
"""Test, time and profile the Triton kernels on one GPU, within 8 minutes and offline.

    python benchmarks/kernels.py [--quick] [--minutes 8] [--output FILE.json]

In this order, what is over time being left out and listed:

- the kernels' tests (pytest), compiled; and the scan held to the naive form in float64;
- two ceilings, a device copy and a large matrix product;
- the kernels round the scan beside plain PyTorch;
- training steps of the recipes, where megatron-core can be imported: tokens/s and MFU, TTT beside
  Transformer at 2k, 8k and 32k tokens, and the slowest kernels of each;
- the scan, forward and forward + backward, for the four models' heads at 2k, 8k and 32k tokens: the
  kernels, the fast PyTorch form, the naive one, and causal scaled_dot_product_attention of the same
  shape; flash-linear-attention's chunk_ttt_linear, gated delta rule and Mamba-2's scan where they
  can be imported. Bytes and FLOPs a second stand beside the ceilings.

Without a GPU: one line and exit code 2. --quick takes tiny shapes, and with TRITON_INTERPRET=1
also runs, for the tests, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernel_forms import MINI_BATCH, around_forms, other_forms, scan_flops

from megatron_ttt.ops import ttt_scan

ROOT = Path(__file__).parent.parent

MODELS = {"125m": (12, 64), "350m": (16, 64), "760m": (16, 96), "1b": (32, 64)}  # heads, head_dim
LENGTHS = (2048, 8192, 32768)
BASE_LR = {"linear": 1.0, "mlp": 0.1}
FILL = 384  # batch x heads at 2048 tokens
SHARE_OF_TESTS, SHARE_OF_STEPS = 0.4, 0.75  # of the minutes, when each is over at the latest
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


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
    Benchmark("cpu" if interpreted else "cuda", arguments).run()


class Benchmark:
    def __init__(self, device: str, arguments: argparse.Namespace):
        self.device, self.quick = device, arguments.quick
        self.name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
        default = f"benchmarks/results/{self.name.lower().replace(' ', '_')}.json"
        self.output = arguments.output or Path(default)
        self.started = time.monotonic()
        self.seconds_in_all = 60 * arguments.minutes
        self.ends = self.started + self.seconds_in_all
        self.left_out: list[str] = []
        self.failed = False
        self.result = {"device": self.name, "torch": torch.__version__, "left_out": self.left_out}

    def run(self) -> None:
        tests = self.part("tests", self.tests) or []
        checked = self.part("checked", self.checks) or []
        ceilings = self.part("ceilings", self.ceilings)
        if ceilings:
            print(f"{self.name}: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s, "
                  f"matrix product {ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s")  # fmt: skip
        self.part("around", self.around)
        self.part("training_steps", self.steps)
        self.part("timed", self.scans)
        for name in self.left_out:
            print(f"left out: {name}")
        wrong = [c for c in checked if c["error"] > c["bound"]]
        if wrong or self.failed or any(test["exit_code"] for test in tests):
            sys.exit(f"the kernels are wrong, or not all was tried: {wrong or tests}")

    def part(self, name: str, function):
        """Run a part, and write down what there is by now: the next may end the process. None where
        it fails."""
        self.result[name] = self.attempt(name, function, needed=True)
        self.result["seconds"] = time.monotonic() - self.started
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.result, indent=1) + "\n")
        return self.result[name]

    def attempt(self, name: str, function, *, needed: bool = False, until: float | None = None):
        """What the function gives; None, and it is listed, where it is too late (`until`) or fails.
        needed: with it the benchmark fails."""
        if until is not None and time.monotonic() > until:
            self.left_out.append(f"{name}: out of time")
            return None
        try:
            return function()
        except Exception as error:
            self.left_out.append(f"{name}: {in_one_line(error)}")
            self.failed |= needed
            return None

    def scans(self) -> list[dict]:
        """Every form of the scan at every model's shape."""
        print("| model | kind | tokens | B x H | form | forward ms | + backward ms | M tokens/s "
              "| TFLOP/s | GB/s | peak MiB |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        lengths = (48,) if self.quick else LENGTHS
        models = {"tiny": (2, 16)} if self.quick else MODELS
        records = []
        for length in lengths:
            for model, (heads, head_dim) in models.items():
                batch = max(1, (2 if self.quick else FILL * LENGTHS[0]) // (heads * length))
                for kind in ("linear", "mlp"):
                    compare = partial(self.compare, model, kind, batch, heads, length, head_dim)
                    records += self.attempt(f"{model} {kind}, {length} tokens", compare) or []
        return records

    def tests(self) -> list[dict]:
        """The kernels' tests, compiled, in three processes: it is compiling that takes the time."""
        if find_spec("pytest") is None:
            self.left_out.append("tests: pytest is not installed")
            return []
        parts = {
            "scan, linear": ["tests/ops/test_triton.py", "-k", "linear"],
            "scan, mlp": ["tests/ops/test_triton.py", "-k", "not linear"],
            "round the scan": ["tests/ops/test_fused.py"],
        }
        if self.quick:
            parts = {"quick": ["tests/ops/test_fused.py", "-k", "for_cuda"]}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        running = {
            part: subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for part, arguments in parts.items()
        }
        results = []
        for part, process in running.items():
            try:
                ends = self.started + SHARE_OF_TESTS * self.seconds_in_all
                output, _ = process.communicate(timeout=max(1.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started
                process.wait()
                self.left_out.append(f"tests, {part}: out of time")
                self.failed = True
                continue
            summary = re.sub(r" in [\d.]+s.*", "", output.strip().splitlines()[-1])
            results.append({"part": part, "summary": summary, "exit_code": process.returncode})
            print(f"tests, {part}: {summary}", flush=True)
        return results

    def around(self) -> list[dict]:
        """What stands round the scan, in its kernels and in PyTorch; forward and backward."""
        records = []
        shapes = [(40, 2, 2, 16)] if self.quick else [(2048, 16, H, D) for H, D in MODELS.values()]
        for length, batch, heads, head_dim in shapes:
            compared = around_forms(torch.device(self.device), length, batch, heads, head_dim)
            for what, tensors, forms, passes in compared:
                for form, function in forms.items():
                    name = f"{what}, {heads * head_dim} channels, {form}"
                    timed = partial(self.time, function, tensors)
                    record = self.attempt(name, timed, until=self.ends)
                    if record is None:
                        continue
                    both = record["forward_s"] + record["backward_s"]
                    # A kernel reads and writes each of its tensors once.
                    moved = passes * tensors[0].nbytes
                    record.update(what=what, form=form, channels=heads * head_dim,
                                  tokens=batch * length)  # fmt: skip
                    if form == "triton":
                        record["bytes_per_s"] = moved / both
                    records.append(record)
                    print(f"{name}: {both * 1e3:.3f} ms", flush=True)
        return records

    def steps(self) -> list[dict]:
        """Training steps, each with its slowest kernels."""
        try:
            from training_step import STEP_HEAD, StepBenchmark, step_row
        except ImportError as error:
            self.left_out.append(f"training steps: {error}")
            return []
        benchmark = StepBenchmark(self.device, tiny=self.quick)
        records = []
        print(STEP_HEAD, flush=True)
        for recipe, length in benchmark.cases:
            record = self.attempt(
                f"training step, {recipe}, {length} tokens",
                partial(benchmark.measure, recipe, length),
                until=self.started + SHARE_OF_STEPS * self.seconds_in_all,
            )
            if record is not None:
                records.append(record)
                print(step_row(record), flush=True)
        benchmark.close()
        return records

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

    def checks(self) -> list[dict]:
        """Each kind in each precision; one that fails does not keep the others."""
        checked = []
        for dtype in BOUNDS:
            for kind in ("linear", "mlp"):
                check = partial(self.check, kind, dtype)
                checked.append(self.attempt(f"check, {kind}, {dtype}", check, needed=True))
        return [check for check in checked if check is not None]

    def check(self, kind: str, dtype: torch.dtype) -> dict:
        """The worst relative error of outputs and gradients; the first call's time."""
        shape = (1, 2, 37, 16) if self.quick else (2, 3, 16 * 40 + 5, 64)
        tensors = self.inputs(kind, *shape, dtype)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        results = []
        seconds = []
        for given, backend in ((tensors, "triton"), (exact, "naive")):
            self.synchronise()
            started = time.perf_counter()
            out, final = ttt_scan(*given[:7], tuple(given[7:]), backend=backend)
            if not results:
                upstream = [torch.randn_like(x) for x in (out, *final)]
            ups = [u.to(x.dtype) for u, x in zip(upstream, (out, *final))]
            results.append([out, *final, *torch.autograd.grad([out, *final], given, ups)])
            self.synchronise()
            seconds.append(time.perf_counter() - started)
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results))
        name = str(dtype).removeprefix("torch.")
        print(f"{kind} {name}: worst relative error {error:.1e}, first call {seconds[0]:.1f} s",
              flush=True)  # fmt: skip
        return {"kind": kind, "dtype": name, "error": error, "bound": BOUNDS[dtype],
                "first_call_s": seconds[0]}  # fmt: skip

    def ceilings(self) -> dict:
        """Bytes a second of a device copy (read and written), FLOPs a second of a bf16 product."""
        size = 256 if self.quick else 8192
        a, b = torch.randn(2, size, size, device=self.device).bfloat16()
        copied = torch.empty_like(a)
        return {
            "bytes_per_s": 2 * a.nbytes / self.seconds(lambda: copied.copy_(a)),
            "flops_per_s": 2 * size**3 / self.seconds(lambda: a @ b),
        }

    def compare(self, model, kind, batch, heads, length, head_dim) -> list[dict]:
        """Time every form of the scan at one shape."""
        records = []
        tensors = self.inputs(kind, batch, heads, length, head_dim, torch.bfloat16)
        tokens = batch * length
        flops = scan_flops(kind, heads * head_dim, head_dim) * tokens
        # q, k, v, output; then those, dout and four gradients' worth: what cannot be avoided.
        traffic = 2 * tokens * heads * head_dim
        forms = {
            backend: lambda backend=backend: ttt_scan(
                *tensors[:7], tuple(tensors[7:]), backend=backend
            )[0]
            for backend in ("triton", "torch", "naive")
            if backend != "naive" or length == LENGTHS[0] or self.quick
        }
        q, k, v = tensors[:3]
        if kind == "linear":  # these know no inner MLP
            forms["attention"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
            forms.update(other_forms(tensors))
        for form, function in forms.items():
            name = f"{model} {kind}, {length} tokens, {form}"
            record = self.attempt(name, partial(self.time, function, tensors), until=self.ends)
            if record is None:
                continue
            both = record["forward_s"] + record["backward_s"]
            record.update(model=model, kind=kind, batch=batch, heads=heads, length=length,
                          head_dim=head_dim, form=form, tokens_per_s=tokens / both)  # fmt: skip
            if form in ("triton", "torch", "naive"):
                record.update(flops_per_s=3 * flops / both, bytes_per_s=12 * traffic / both)
            records.append(record)
            print(row(record), flush=True)
        return records

    def time(self, function, tensors) -> dict:
        """Medians of a forward and a backward, and the peak memory of both over the start."""
        upstream = as_tuple(function())
        upstream = [torch.randn_like(out) for out in upstream]
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
        forward = self.seconds(function)
        total = self.seconds(both)
        return {"forward_s": forward, "backward_s": total - forward, "peak_bytes": peak}

    def seconds(self, function) -> float:
        """Median time of one of some calls that follow each other, so that a GPU is never short of
        work while the host prepares the next; five times, fewer where they are slow."""
        function()
        calls = max(1, min(50, round(0.02 / self.seconds_of(function, 1))))
        times, until = [], time.monotonic() + 1
        while len(times) < 3 or (len(times) < 5 and time.monotonic() < until):
            times.append(self.seconds_of(function, calls) / calls)
            if self.quick:
                break
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


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def row(record: dict) -> str:
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
