"""Compile what the recipes launch, ahead of time, for GPUs that need not be there.

    python tests/ops/compile_triton.py [--kernel mlp_backward] [--choices 1] [--output FILE.json]

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
from itertools import pairwise
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ttt.ops.triton import linear, mlp
from megatron_ttt.ops.triton.common import GROUP, worth_trying

TARGETS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
BATCH, HEADS, MINI_BATCH = 2, 12, 16
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class Recorder:
    """Stands for a kernel; remembers its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((args, constants))


def source(kernel, args, constants) -> ASTSource:
    """What Triton's launcher makes of these arguments."""
    function = kernel.fn  # beneath the autotuner
    signature, attributes = {}, {}
    for i, (parameter, value) in enumerate(zip(function.params, args)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32"
        aligned = isinstance(value, torch.Tensor) or value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[i,] = [["tt.divisibility", 16]]
    signature.update({name: "constexpr" for name in constants})
    return ASTSource(function, signature, constexprs=constants, attrs=attributes)


def launches(kind: str, F: int, dtype: torch.dtype, L: int = 2048) -> dict:
    """The kernels of a forward and a backward, with the arguments of their launches."""
    module = {"linear": linear, "mlp": mlp}[kind]
    recorders = {
        name: Recorder(getattr(module, name)) for name in (f"{kind}_forward", f"{kind}_backward")
    }
    vars(module).update(recorders)
    try:
        with torch.device("meta"):
            q, k, v = torch.empty(3, BATCH, HEADS, L, F, dtype=dtype)
            lam, tau = torch.empty(BATCH * HEADS, L), torch.empty(MINI_BATCH)
            gamma, beta = torch.empty(2, HEADS, F)
            widths = (F, F) if kind == "linear" else (F, 4 * F, F)
            state = [
                torch.empty(HEADS, rows, n).expand(BATCH, HEADS, rows, n)
                for m, n in pairwise(widths)
                for rows in (m, 1)
            ]
            shared = q, k, v, lam, tau, gamma, beta
            out, final, kept = module.forward(*shared, state, GROUP, True)
            module.backward(*shared, kept, GROUP, out, final)
    finally:
        vars(module).update({name: recorder.kernel for name, recorder in recorders.items()})
    return {name: (recorder.kernel, *recorder.launches[0]) for name, recorder in recorders.items()}


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


def compiled(kind: str, name: str, F: int, dtype: torch.dtype, choices: int) -> list[dict]:
    """One record per target and choice that autotuning tries, of the first few."""
    kernel, args, constants = launches(kind, F, dtype)[name]
    records = []
    for config in worth_trying(kernel.configs, {}, **constants)[:choices]:
        for target in TARGETS:
            program = triton.compile(
                source(kernel, args, {**constants, **config.kwargs}),
                target=GPUTarget("cuda", target, 32),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
            records.append(
                {
                    "kernel": name,
                    "head_dim": F,
                    "operands": str(dtype).removeprefix("torch."),
                    "target": f"sm_{target}",
                    "block": config.kwargs.get("BM", "-"),
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
    parser.add_argument("--choices", type=int, default=9, help="this many of what is tuned over")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print("| kernel | F | operands | target | BM | warps | registers | local B | shared KiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    records = []
    for kind in ("linear", "mlp"):
        for name in (f"{kind}_forward", f"{kind}_backward"):
            for F in (64, 96) if arguments.kernel in (None, name) else ():
                for record in compiled(kind, name, F, torch.bfloat16, arguments.choices):
                    records.append(record)
                    print(row(record), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
