"""Compile what the recipes launch, ahead of time, for GPUs that need not be there.

    python tests/ops/compile_triton.py [--kernel mlp_backward] [--head-dims 64 96] [--mini-batch 16]
        [--targets 80 90] [--choices 1] [--output FILE.json]

The launchers run on tensors without memory, and what they launch is compiled instead, as Triton
would for the same arguments. Prints a table: registers and bytes of local memory (spills) a thread,
shared memory a program.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ttt.mixers.ttt.inner_model import CHECKPOINT_INTERVAL
from megatron_ttt.mixers.ttt.linear import kernels as linear
from megatron_ttt.mixers.ttt.mlp import backward_kernel, forward_kernel
from megatron_ttt.mixers.ttt.scan import INNER_MODELS
from megatron_ttt.mixers.ttt.triton.common import worth_trying
from megatron_ttt.ops.triton import (
    conv_rope,
    layernorm_gate,
    rmsnorm_conv,
)

MODULES = {"linear": (linear, linear), "mlp": (forward_kernel, backward_kernel)}
KERNELS = [f"{kind}_{way}" for kind in MODULES for way in ("forward", "backward")]
ROUND = {  # the scan; kernels and their modules
    "conv_rope_forward": conv_rope,
    "conv_rope_backward": conv_rope,
    "moments": layernorm_gate,
    "layernorm_gate_forward": layernorm_gate,
    "row_sums": layernorm_gate,
    "layernorm_gate_backward": layernorm_gate,
    "row_scales": rmsnorm_conv,
    "rmsnorm_conv_forward": rmsnorm_conv,
    "row_means": rmsnorm_conv,
    "rmsnorm_conv_backward": rmsnorm_conv,
}
KERNELS += ROUND
HEAD_DIMS, TARGETS = (64, 96), (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
BATCH, HEADS = 2, 12
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class Recorder:
    """Stands for a kernel; remembers its launches: arguments, constants, options."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **given):
        names = {parameter.name for parameter in jitted(self.kernel).params}
        constants = {name: value for name, value in given.items() if name in names}
        options = {name: value for name, value in given.items() if name not in names}
        self.launches.append((args, constants, options))


def source(kernel, args, constants) -> ASTSource:
    """What Triton's launcher makes of these arguments."""
    function = jitted(kernel)
    signature, attributes = {}, {}
    for i, (parameter, value) in enumerate(zip(function.params, args)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        aligned = isinstance(value, torch.Tensor) or value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[i,] = [["tt.divisibility", 16]]
    signature.update({name: "constexpr" for name in constants})
    return ASTSource(function, signature, constexprs=constants, attrs=attributes)


def jitted(kernel):
    """The kernel, beneath its autotuner if it has one."""
    return kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel


@contextmanager
def recorded(kernels: dict):
    """The launches of kernels, given by name with their modules, by name as they come."""
    recorders = {name: Recorder(getattr(module, name)) for name, module in kernels.items()}
    for name, module in kernels.items():
        setattr(module, name, recorders[name])
    launches = {}
    try:
        with torch.device("meta"):
            yield launches
    finally:
        for name, module in kernels.items():
            setattr(module, name, recorders[name].kernel)
            launches[name] = recorders[name].kernel, recorders[name].launches


def launches(kind: str, F: int, dtype: torch.dtype, L: int = 2048, K: int = 16) -> dict:
    """The kernels of a forward and a backward, with the arguments of their launches."""
    forward, backward = MODULES[kind]
    with recorded({f"{kind}_forward": forward, f"{kind}_backward": backward}) as launches:
        q, k, v = torch.empty(3, BATCH, HEADS, L, F, dtype=dtype)
        lam, tau = torch.empty(BATCH * HEADS, L), torch.empty(K)
        gamma, beta = torch.empty(2, HEADS, F)
        state = [
            torch.empty(HEADS, *shape).expand(BATCH, HEADS, *shape)
            for shape in INNER_MODELS[kind].state_shapes(F).values()
        ]
        shared = q, k, v, lam, tau, gamma, beta
        out, final, kept = forward.forward(*shared, state, CHECKPOINT_INTERVAL, True)
        backward.backward(*shared, state, kept, CHECKPOINT_INTERVAL, out, final)
    return launches


def launches_round_the_scan(F: int, dtype: torch.dtype, L: int = 2048) -> dict:
    """The same of the kernels before and after the scan, on one rank and on one of two."""
    communicating = {name: vars(layernorm_gate)[name] for name in ("row_statistics", "dist")}
    layernorm_gate.row_statistics = lambda var, mean, *_: (mean, var)
    layernorm_gate.dist = SimpleNamespace(all_reduce=lambda *_, **__: None)
    D = HEADS * F
    try:
        with recorded(ROUND) as launches:
            x, gate, v = torch.empty(L, BATCH, 3 * D, dtype=dtype, requires_grad=True).chunk(3, -1)
            weight, bias = torch.empty(D, 1, 4, dtype=dtype), torch.empty(D, dtype=dtype)
            angles = torch.empty(2, 16, F // 2)
            outputs = [*conv_rope.conv_rope(x, [(weight, bias), (weight, bias)], *angles)]
            for ranks in (1, 2):
                group = SimpleNamespace(size=lambda ranks=ranks: ranks)
                outputs.append(layernorm_gate.layernorm_gate(v, gate, bias, bias, 1e-6, group))
            h = torch.empty(L, BATCH, D, dtype=dtype, requires_grad=True)
            outputs.append(rmsnorm_conv.rmsnorm_conv(h, bias, 1e-6, weight, bias))
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    finally:
        vars(layernorm_gate).update(communicating)
    return launches


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "local_bytes": stack + local}


def compiled(
    name: str, F: int, K: int, dtype: torch.dtype, targets: Sequence[int], choices: int
) -> list[dict]:
    """One record per target, launch, and choice that autotuning tries, of the first few."""
    kind = name.split("_")[0]
    found = launches(kind, F, dtype, K=K) if kind in MODULES else launches_round_the_scan(F, dtype)
    kernel, launched = found[name]
    records = []
    for (args, constants, options), target in product(launched, targets):
        if jitted(kernel) is kernel:
            configs = [triton.Config({}, num_warps=options.get("num_warps", 4), num_stages=1)]
        else:
            configs = worth_trying(kernel.configs, {}, **constants)[:choices]
        for config in configs:
            program = triton.compile(
                source(kernel, args, {**constants, **config.kwargs}),
                target=GPUTarget("cuda", target, 32),
                options={
                    **options,
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                },
            )
            records.append(
                {
                    "kernel": name,
                    "head_dim": F,
                    "operands": str(dtype).removeprefix("torch."),
                    "target": f"sm_{target}",
                    "block": config.kwargs.get("BM", constants.get("BM", "-")),
                    "warps": config.num_warps,
                    **resources(program.asm["cubin"]),
                    "shared_bytes": program.metadata.shared,
                    "shared_limit": SHARED_LIMIT[target],
                }
            )
    return records


def row(record: dict) -> str:
    """Of the table."""
    cells = [value for name, value in record.items() if not name.startswith("shared_")]
    cells.append(f"{record['shared_bytes'] / 1024:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", help="this one alone, such as mlp_backward")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--mini-batch", type=int, default=16, help="of the scan")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="90 for sm_90")
    parser.add_argument("--choices", type=int, default=9, help="this many of what is tuned over")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print("| kernel | F | operands | target | BM | warps | registers | local B | shared KiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    records = []
    for name, F in product(KERNELS, arguments.head_dims):
        if arguments.kernel in (None, name):
            for record in compiled(
                name,
                F,
                arguments.mini_batch,
                torch.bfloat16,
                arguments.targets,
                arguments.choices,
            ):
                records.append(record)
                print(row(record), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
