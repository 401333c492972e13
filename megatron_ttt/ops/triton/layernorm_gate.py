"""gelu(gate) * LayerNorm(x) in one kernel each way.

A program takes tiles of R whole rows, this rank's D columns of them, and in the backward STEPS
tiles one after the other, over which it sums the gradients of weight and bias. Where ranks share a
row its sums over columns are exchanged between two kernels: `moments` and the forward, `row_sums`
and the backward. WHOLE: they do not, and a kernel takes its own.

Sizes: N rows, D columns of this rank, P >= D a power of two, R * P = TILE.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.sharded_layer_norm import row_statistics
from megatron_ttt.ops.triton.common import FMA, padded
from megatron_ttt.ops.triton.gelu import gelu_derivative, gelu_gate

TILE, STEPS = 2048, 16


@triton.jit
def load_rows(x_ND, rows, columns, stride, inside):
    return tl.load(x_ND + rows.to(tl.int64) * stride + columns, mask=inside, other=0).to(tl.float32)


@triton.jit
def centred_rows(x, inside, D: tl.constexpr):
    """x less its mean (zero outside), the mean, and the variance; [R, P], [R, 1], [R, 1]."""
    mean = (tl.sum(x, 1) / D)[:, None]
    centred = tl.where(inside, x - mean, 0.0)
    return centred, mean, (tl.sum(centred * centred, 1) / D)[:, None]


@triton.jit(do_not_specialize=["N"])
def moments(x_ND, var_N, mean_N, N, x_n, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Grid [N / R]."""
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, P)[None, :]
    inside = (rows < N) & (columns < D)
    _, mean, var = centred_rows(load_rows(x_ND, rows, columns, x_n, inside), inside, D)
    tl.store(mean_N + rows, mean, mask=rows < N)
    tl.store(var_N + rows, var, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def layernorm_gate_forward(
    x_ND, gate_ND, weight_D, bias_D, mean_N, rstd_N, out_ND, N, x_n, gate_n, eps,
    D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid [N / R]. mean_N and rstd_N are written if WHOLE, else read."""
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, P)[None, :]
    inside = (rows < N) & (columns < D)
    x = load_rows(x_ND, rows, columns, x_n, inside)
    if WHOLE:
        centred, mean, var = centred_rows(x, inside, D)
        rstd = tl.rsqrt(var + eps)
        tl.store(mean_N + rows, mean, mask=rows < N)
        tl.store(rstd_N + rows, rstd, mask=rows < N)
    else:
        centred = x - tl.load(mean_N + rows, mask=rows < N, other=0.0)
        rstd = tl.load(rstd_N + rows, mask=rows < N, other=0.0)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0).to(tl.float32)
    bias = tl.load(bias_D + columns, mask=columns < D, other=0).to(tl.float32)
    z = load_rows(gate_ND, rows, columns, gate_n, inside)
    out = (centred * rstd * weight + bias) * z * gelu_gate(z)
    tl.store(out_ND + rows.to(tl.int64) * D + columns, out, mask=inside)


@triton.jit
def gated_rows(
    x_ND, gate_ND, weight_D, mean_N, rstd_N, dout_ND, rows, columns, N, x_n, gate_n, dout_n,
    D: tl.constexpr,
):  # fmt: skip
    """Of rows of the backward: xhat, rstd, dout, gate, gelu's gate of it, and the gradient of xhat;
    zero outside."""
    inside = (rows < N) & (columns < D)
    dout = load_rows(dout_ND, rows, columns, dout_n, inside)
    z = load_rows(gate_ND, rows, columns, gate_n, inside)
    mean = tl.load(mean_N + rows, mask=rows < N, other=0.0)
    rstd = tl.load(rstd_N + rows, mask=rows < N, other=0.0)
    xhat = tl.where(inside, (load_rows(x_ND, rows, columns, x_n, inside) - mean) * rstd, 0.0)
    g = gelu_gate(z)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0).to(tl.float32)
    return xhat, rstd, dout, z, g, dout * z * g * weight


@triton.jit(do_not_specialize=["N"])
def row_sums(
    x_ND, gate_ND, weight_D, mean_N, rstd_N, dout_ND, sums_2N, N, x_n, gate_n, dout_n,
    D: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid [N / R]. Of each row, the sums of dxhat and of dxhat * xhat."""
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, P)[None, :]
    xhat, _, _, _, _, dxhat = gated_rows(
        x_ND, gate_ND, weight_D, mean_N, rstd_N, dout_ND, rows, columns, N, x_n, gate_n, dout_n, D
    )
    tl.store(sums_2N + rows, tl.sum(dxhat, 1)[:, None], mask=rows < N)
    tl.store(sums_2N + N + rows, tl.sum(dxhat * xhat, 1)[:, None], mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def layernorm_gate_backward(
    x_ND, gate_ND, weight_D, bias_D, mean_N, rstd_N, dout_ND, means_2N,
    dx_ND, dgate_ND, partial_T2D, N, x_n, gate_n, dout_n,
    D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid [T], T = N / (R * STEPS). means_2N: the means over whole rows of dxhat and dxhat * xhat,
    not read if WHOLE. partial_T2D: the gradients of weight and bias, summed over a program's rows.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, P)[None, :]
    bias = tl.load(bias_D + columns, mask=columns < D, other=0).to(tl.float32)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0).to(tl.float32)
    dweight, dbias = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    for step in range(STEPS):
        rows = (program * STEPS + step) * R + tl.arange(0, R)[:, None]
        inside = (rows < N) & (columns < D)
        xhat, rstd, dout, z, g, dxhat = gated_rows(
            x_ND, gate_ND, weight_D, mean_N, rstd_N, dout_ND, rows, columns,
            N, x_n, gate_n, dout_n, D,
        )  # fmt: skip
        if WHOLE:
            mean_d = (tl.sum(dxhat, 1) / D)[:, None]
            mean_dx = (tl.sum(dxhat * xhat, 1) / D)[:, None]
        else:
            mean_d = tl.load(means_2N + rows, mask=rows < N, other=0.0)
            mean_dx = tl.load(means_2N + N + rows, mask=rows < N, other=0.0)
        dx = (dxhat - mean_d - xhat * mean_dx) * rstd
        dgate = dout * (xhat * weight + bias) * gelu_derivative(z, g)
        tile = rows.to(tl.int64) * D + columns
        tl.store(dx_ND + tile, dx, mask=inside)
        tl.store(dgate_ND + tile, dgate, mask=inside)
        dweight += tl.sum(dout * z * g * xhat, 0)
        dbias += tl.sum(dout * z * g, 0)
    columns = tl.arange(0, P)
    partial = partial_T2D + program.to(tl.int64) * 2 * D + columns
    tl.store(partial, dweight, mask=columns < D)
    tl.store(partial + D, dbias, mask=columns < D)


def layernorm_gate(x, gate, weight, bias, eps, group) -> Tensor:
    """gelu(gate) * sharded_layer_norm(x, ...), GELU in its tanh approximation; x's shape and dtype.

    x, gate [..., D], columns adjacent. Statistics and arithmetic are in float32. Collective where
    `group` has several ranks.
    """
    return NormGate.apply(x, gate, weight, bias, eps, group)


class NormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, bias, eps, group):
        ctx.shape, ctx.group = x.shape, group
        x, gate = as_rows(x), as_rows(gate)
        weight, bias = weight.contiguous(), bias.contiguous()
        (N, D), whole = x.shape, group.size() == 1
        mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
        out = x.new_empty(x.shape)
        tiles = tiling(D)
        grid = (triton.cdiv(N, tiles["R"]),)
        with torch.cuda.device_of(x):
            if not whole:
                moments[grid](x, rstd, mean, N, x.stride(0), **tiles)
                mean, rstd = row_statistics(rstd, mean, eps, group)
            layernorm_gate_forward[grid](
                x, gate, weight, bias, mean, rstd, out, N, x.stride(0), gate.stride(0), eps,
                **tiles, WHOLE=whole,
            )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, bias, mean, rstd)
        return out.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gate, weight, bias, mean, rstd = ctx.saved_tensors
        dout = as_rows(dout)
        (N, D), ranks = x.shape, ctx.group.size()
        tiles = tiling(D)
        programs = triton.cdiv(N, tiles["R"] * STEPS)
        dx, dgate = x.new_empty(x.shape), x.new_empty(x.shape)
        partial = mean.new_empty((programs, 2, D))
        sums = mean.new_empty((2, N)) if ranks > 1 else mean
        strides = x.stride(0), gate.stride(0), dout.stride(0)
        rows = x, gate, weight
        with torch.cuda.device_of(x):
            if ranks > 1:
                grid = (triton.cdiv(N, tiles["R"]),)
                row_sums[grid](*rows, mean, rstd, dout, sums, N, *strides, **tiles)
                dist.all_reduce(sums, group=ctx.group)
                sums /= D * ranks
            layernorm_gate_backward[programs,](
                *rows, bias, mean, rstd, dout, sums, dx, dgate, partial, N, *strides,
                **tiles, STEPS=STEPS, WHOLE=ranks == 1,
            )  # fmt: skip
        dweight, dbias = partial.sum(0).to(weight.dtype)
        return dx.view(ctx.shape), dgate.view(ctx.shape), dweight, dbias, None, None


def tiling(D: int) -> dict[str, int]:
    P = padded(D)
    return {"D": D, "P": P, "R": max(TILE // P, 1), **FMA}


def as_rows(x: Tensor) -> Tensor:
    """[N, D], columns adjacent."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()
