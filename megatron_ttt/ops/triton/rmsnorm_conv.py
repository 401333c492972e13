"""h + conv(RMSNorm(h)), forward and backward.

What a whole row decides comes first, in a kernel of its own that reads the row: forward 1/rms,
backward the mean of dxhat * xhat. The rest is done by programs of BL tokens of one sequence by BC
channels, as in `conv_rope.py`; each leaves one partial sum of the parameters' gradients.

Sizes: L tokens, B batch, N = L * B rows, C channels, P >= C a power of two, W width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.triton.common import FMA, padded

BLOCK = {"BL": 64, "BC": 64, "num_warps": 8, **FMA}
ROWS = 2048  # elements of the rows that a program takes at a time


@triton.jit(do_not_specialize=["N"])
def row_scales(h_NC, rstd_N, N, eps, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Grid [N / R]. 1/rms of rows."""
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, P)[None, :]
    inside = (rows < N) & (columns < C)
    h = tl.load(h_NC + rows.to(tl.int64) * C + columns, mask=inside, other=0).to(tl.float32)
    tl.store(rstd_N + rows, tl.rsqrt(tl.sum(h * h, 1) / C + eps)[:, None], mask=rows < N)


@triton.jit(do_not_specialize=["N", "B"])
def row_means(
    h_NC, scale_C, weight_CW, rstd_N, dout_NC, mean_N, N, B,
    C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Grid [N / R]. The mean of dxhat * xhat over rows."""
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, P)[None, :]
    real = columns < C
    dn = tl.zeros((R, P), tl.float32)
    for shift in tl.static_range(W):
        there = rows.to(tl.int64) + shift * B
        inside = (there < N) & real
        dout = tl.load(dout_NC + there * C + columns, mask=inside, other=0).to(tl.float32)
        weight = tl.load(weight_CW + columns * W + W - 1 - shift, mask=real, other=0)
        dn += dout * weight.to(tl.float32)
    inside = (rows < N) & real
    h = tl.load(h_NC + rows.to(tl.int64) * C + columns, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_C + columns, mask=real, other=0).to(tl.float32)
    rstd = tl.load(rstd_N + rows, mask=rows < N, other=0.0)
    tl.store(mean_N + rows, (tl.sum(dn * scale * h, 1) / C)[:, None] * rstd, mask=rows < N)


@triton.jit(do_not_specialize=["L", "B"])
def rmsnorm_conv_forward(
    h_LBC, scale_C, weight_CW, bias_C, rstd_LB, out_LBC, L, B,
    C: tl.constexpr, W: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid [tokens / BL, channels / BC, B]."""
    batch = tl.program_id(2)
    row = (tl.program_id(0) * BL + tl.arange(0, BL))[:, None].to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    real = channels < C
    scale = tl.load(scale_C + channels, mask=real, other=0).to(tl.float32)
    bias = tl.load(bias_C + channels, mask=real, other=0).to(tl.float32)
    out = tl.zeros((BL, BC), tl.float32) + bias
    for shift in tl.static_range(W):
        source = row - shift
        there = (source >= 0) & (source < L)
        tile, inside = (source * B + batch) * C + channels, there & real[None, :]
        h = tl.load(h_LBC + tile, mask=inside, other=0).to(tl.float32)
        rstd = tl.load(rstd_LB + source * B + batch, mask=there, other=0.0)
        weight = tl.load(weight_CW + channels * W + W - 1 - shift, mask=real, other=0)
        out += h * rstd * (scale * weight.to(tl.float32))
        if shift == 0:
            out += h
    tile, inside = (row * B + batch) * C + channels, (row < L) & real[None, :]
    tl.store(out_LBC + tile, out, mask=inside)


@triton.jit(do_not_specialize=["L", "B"])
def rmsnorm_conv_backward(
    h_LBC, scale_C, weight_CW, rstd_LB, mean_LB, dout_LBC, dh_LBC, sums_NTC, L, B,
    C: tl.constexpr, W: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid [tokens / BL, channels / BC, B]. sums_NTC: of a block of tokens, the gradients of the W
    weights, the bias and the scale, T = W + 2."""
    batch = tl.program_id(2)
    row = (tl.program_id(0) * BL + tl.arange(0, BL))[:, None].to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    real = channels < C
    here = row < L
    tile, inside = (row * B + batch) * C + channels, here & real[None, :]
    h = tl.load(h_LBC + tile, mask=inside, other=0).to(tl.float32)
    rstd = tl.load(rstd_LB + row * B + batch, mask=here, other=0.0)
    mean = tl.load(mean_LB + row * B + batch, mask=here, other=0.0)
    scale = tl.load(scale_C + channels, mask=real, other=0).to(tl.float32)
    xhat = h * rstd
    sums = sums_NTC + (tl.program_id(0) * B + batch).to(tl.int64) * (W + 2) * C + channels
    dh, dn = tl.zeros((BL, BC), tl.float32), tl.zeros((BL, BC), tl.float32)
    for shift in tl.static_range(W):
        w = W - 1 - shift  # through which the output `shift` tokens on takes this one
        there = (row + shift < L) & real[None, :]
        dout = tl.load(dout_LBC + tile + shift * B * C, mask=there, other=0).to(tl.float32)
        dn += dout * tl.load(weight_CW + channels * W + w, mask=real, other=0).to(tl.float32)
        tl.store(sums + w * C, tl.sum(dout * xhat, 0) * scale, mask=real)
        if shift == 0:
            dh += dout
            tl.store(sums + W * C, tl.sum(dout, 0), mask=real)
    tl.store(sums + (W + 1) * C, tl.sum(dn * xhat, 0), mask=real)
    dh += (dn * scale - xhat * mean) * rstd
    tl.store(dh_LBC + tile, dh, mask=inside)


def rmsnorm_conv(h_LBC, scale_C, eps, weight_C1W, bias_C) -> Tensor:
    """h + causal_conv(h / rms(h) * scale), for whole sequences; h's shape and dtype.

    Computed in float32 and rounded once, at the end.
    """
    return NormConv.apply(h_LBC, scale_C, eps, weight_C1W, bias_C)


class NormConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, scale, eps, weight, bias):
        h, scale, weight, bias = (t.contiguous() for t in (h, scale, weight, bias))
        (L, B, C), W = h.shape, weight.shape[-1]
        rstd, out = h.new_empty(L * B, dtype=torch.float32), h.new_empty(h.shape)
        grids = grids_of(L, B, C)
        with torch.cuda.device_of(h):
            row_scales[grids[0]](h, rstd, L * B, eps, **rows_of(C))
            rmsnorm_conv_forward[grids[1]](
                h, scale, weight, bias, rstd, out, L, B, C=C, W=W, **BLOCK
            )
        ctx.save_for_backward(h, scale, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        h, scale, weight, rstd = ctx.saved_tensors
        (L, B, C), W = h.shape, weight.shape[-1]
        dout, dh, mean = dout.contiguous(), h.new_empty(h.shape), rstd.new_empty(L * B)
        grids = grids_of(L, B, C)
        sums = rstd.new_empty((grids[1][0] * B, W + 2, C))
        with torch.cuda.device_of(h):
            row_means[grids[0]](h, scale, weight, rstd, dout, mean, L * B, B, W=W, **rows_of(C))
            rmsnorm_conv_backward[grids[1]](
                h, scale, weight, rstd, mean, dout, dh, sums, L, B, C=C, W=W, **BLOCK
            )
        sums = sums.sum(0)
        dweight = sums[:W].t().unsqueeze(1).to(weight.dtype)
        return dh, sums[W + 1].to(scale.dtype), None, dweight, sums[W].to(weight.dtype)


def rows_of(C: int) -> dict[str, int]:
    P = padded(C)
    return {"C": C, "P": P, "R": max(ROWS // P, 1), **FMA}


def grids_of(L: int, B: int, C: int) -> tuple[tuple[int], tuple[int, int, int]]:
    """Of the kernels for whole rows, and of the others."""
    return (triton.cdiv(L * B, rows_of(C)["R"]),), (
        triton.cdiv(L, BLOCK["BL"]),
        triton.cdiv(C, BLOCK["BC"]),
        B,
    )
