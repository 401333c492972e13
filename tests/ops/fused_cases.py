"""Measure the kernels round the scan against PyTorch in float64, and print the figures as JSON.

    TRITON_INTERPRET=1 torchrun --nproc-per-node 2 tests/ops/fused_cases.py OUTPUT.json
    torchrun --nproc-per-node 1 tests/ops/fused_cases.py OUTPUT.json      # compiled, on a GPU

With two processes, rows are shared by two ranks too.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import relative
from triton_cases import DEVICE, poisoned

from megatron_ttt.ops.conv_rope import causal_conv, reference_conv_rope
from megatron_ttt.ops.rope import mini_batch_angles
from megatron_ttt.ops.sharded_layer_norm import sharded_layer_norm
from megatron_ttt.ops.triton.conv_rope import conv_rope
from megatron_ttt.ops.triton.layernorm_gate import layernorm_gate
from megatron_ttt.ops.triton.rmsnorm_conv import rmsnorm_conv

EPS = 1e-6


def reference_rmsnorm_conv(h, scale, eps, weight, bias):
    return h + causal_conv(F.rms_norm(h, h.shape[-1:], scale, eps), weight, bias)


def reference_layernorm_gate(x, gate, weight, bias, eps, group):
    return F.gelu(gate, approximate="tanh") * sharded_layer_norm(x, weight, bias, eps, group)


def compare(fused, plain, tensors: list[torch.Tensor]) -> dict:
    """The relative errors of outputs and of the gradients of `tensors`, the same for both; whether
    a second run gave other bits."""
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected = plain(exact)
    upstream = [torch.randn_like(y) for y in expected]
    upstream = [u.to(tensors[0].dtype).double() for u in upstream]
    expected = [*expected, *torch.autograd.grad(expected, exact, upstream)]

    def measure():
        outputs = fused(tensors)
        given = [u.to(DEVICE, y.dtype) for u, y in zip(upstream, outputs)]
        assert all(y.dtype == tensors[0].dtype for y in outputs)
        return [*outputs, *torch.autograd.grad(outputs, tensors, given)]

    first, second = measure(), measure()
    return {
        "errors": [relative(a.cpu(), b) for a, b in zip(first, expected)],
        "repeats": all(map(torch.equal, first, second)),
    }


def on_device(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(DEVICE, dtype).requires_grad_()


def part_of_projection(L: int, B: int, C: int, dtype: torch.dtype) -> torch.Tensor:
    """[L, B, C], the middle third of rows three times as wide."""
    return on_device(torch.randn(L, B, 3 * C), dtype).chunk(3, -1)[1].detach().requires_grad_()


def conv_rope_case(L: int, B: int, H: int, F: int, K: int, W: int, dtype) -> dict:
    C = H * F
    tensors = [part_of_projection(L, B, C, dtype)]
    for _ in range(2):
        tensors += [on_device(torch.randn(C, 1, W), dtype), on_device(torch.randn(C), dtype)]

    def run(function, dtype, device, tensors):
        x, *weights = tensors
        angles = mini_batch_angles(K, F, 1e4, dtype, device)
        return function(x, [weights[:2], weights[2:]], *angles)

    return compare(
        partial(run, conv_rope, torch.float32, torch.device(DEVICE)),
        partial(run, reference_conv_rope, torch.float64, torch.device("cpu")),
        tensors,
    )


def rmsnorm_conv_case(L: int, B: int, C: int, W: int, dtype) -> dict:
    shapes = (L, B, C), (C,), (C, 1, W), (C,)
    tensors = [on_device(torch.randn(shape), dtype) for shape in shapes]

    def run(function, tensors):
        h, scale, weight, bias = tensors
        return [function(h, scale, EPS, weight, bias)]

    return compare(partial(run, rmsnorm_conv), partial(run, reference_rmsnorm_conv), tensors)


def layernorm_gate_case(N: int, B: int, D: int, dtype, group, alone) -> dict:
    """Rows of D columns on each rank of `group`; `alone`, of this rank, has them whole."""
    rank, ranks = group.rank(), group.size()
    mine = slice(rank * D, (rank + 1) * D)
    whole = [torch.randn(N, B, ranks * D) + 0.5 for _ in range(2)]
    whole += [torch.randn(ranks * D) for _ in range(2)]
    tensors = [on_device(x, dtype) for x in whole]

    def fused(tensors):
        x, gate, weight, bias = (t[..., mine] for t in tensors)
        return [layernorm_gate(x, gate, weight, bias, EPS, group)]

    def plain(tensors):
        return [reference_layernorm_gate(*tensors, EPS, alone)[..., mine]]

    if ranks == 1:
        return compare(fused, plain, tensors)

    # The loss is the sum over ranks, so a rank's gradient is that of all the outputs.
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference_layernorm_gate(*exact, EPS, alone)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected = [expected, *torch.autograd.grad(expected, exact, upstream)]

    def measure():
        out = fused(tensors)[0]
        gradients = torch.autograd.grad(out, tensors, upstream[..., mine].to(dtype))
        return [out, *(g[..., mine] for g in gradients)]

    first, second = measure(), measure()
    return {
        "errors": [relative(a, b[..., mine]) for a, b in zip(first, expected)],
        "repeats": all(map(torch.equal, first, second)),
    }


def cases(group, alone):
    """Name and figures of each: first those of both ranks, then those of the first rank alone."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if group.size() > 1:
        for name, dtype in dtypes.items():
            measured = layernorm_gate_case(5, 2, 40, dtype, group, alone)
            yield f"{name} layernorm_gate on two ranks", measured
    if group.rank() > 0:
        return
    for name, dtype in dtypes.items():
        yield f"{name} conv_rope", conv_rope_case(70, 2, 6, 16, 16, 4, dtype)
        yield f"{name} rmsnorm_conv", rmsnorm_conv_case(70, 2, 96, 4, dtype)
        yield f"{name} layernorm_gate", layernorm_gate_case(300, 2, 96, dtype, alone, alone)
    yield "fp32 conv_rope, short", conv_rope_case(2, 1, 1, 20, 32, 4, torch.float32)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    poisoned()
    results = dict(cases(dist.group.WORLD, alone))
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()
