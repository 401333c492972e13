"""Two causal convolutions and their RoPE in one pass over the input, forward and backward.

A program takes BL tokens of one sequence by BC channels. It reads the tokens once a tap, W times,
of which the caches serve all but the first, and writes queries and keys. The backward reads both
gradients at W shifts and the input once, and sums the gradients of weights and biases over its
tokens; those partial sums are added up outside, in a fixed order.

Sizes: L tokens, B batch, C channels = H heads of F features, W width, K mini-batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.triton.common import FMA

BLOCK = {"BL": 64, "BC": 64, "num_warps": 8, **FMA}


@triton.jit
def rotate(x, cos, sin, BL: tl.constexpr, BC: tl.constexpr):
    """Turn the pairs (2i, 2i + 1) of the columns of x [BL, BC] by angles [BL, BC / 2]."""
    even, odd = tl.split(x.reshape(BL, BC // 2, 2))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(BL, BC)


@triton.jit
def load_angles(cos_KF, sin_KF, tokens, first, F: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """Those of the channels from `first` on; position and feature repeat, so nothing is masked."""
    pair = (first // 2 + tl.arange(0, BC // 2)) % (F // 2)
    tile = (tokens % K)[:, None] * (F // 2) + pair[None, :]
    return tl.load(cos_KF + tile), tl.load(sin_KF + tile)


@triton.jit(do_not_specialize=["L", "B"])
def conv_rope_forward(
    x_LBC, wq_CW, bq_C, wk_CW, bk_C, cos_KF, sin_KF, q_LBC, k_LBC,
    L, B, C, x_l, x_b,
    F: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid [tokens / BL, channels / BC, B]."""
    first, batch = tl.program_id(1) * BC, tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BL + tl.arange(0, BL)
    channels = first + tl.arange(0, BC)
    real = channels < C
    row = tokens[:, None].to(tl.int64)
    q = tl.zeros((BL, BC), tl.float32) + tl.load(bq_C + channels, mask=real, other=0).to(tl.float32)
    k = tl.zeros((BL, BC), tl.float32) + tl.load(bk_C + channels, mask=real, other=0).to(tl.float32)
    for w in tl.static_range(W):
        source = row - (W - 1) + w
        inside = (source >= 0) & (source < L) & real[None, :]
        x = tl.load(x_LBC + source * x_l + batch * x_b + channels, mask=inside, other=0)
        x = x.to(tl.float32)
        q += x * tl.load(wq_CW + channels * W + w, mask=real, other=0).to(tl.float32)
        k += x * tl.load(wk_CW + channels * W + w, mask=real, other=0).to(tl.float32)
    cos, sin = load_angles(cos_KF, sin_KF, tokens, first, F, K, BC)
    tile, inside = (row * B + batch) * C + channels, (row < L) & real[None, :]
    tl.store(q_LBC + tile, rotate(q, cos, sin, BL, BC), mask=inside)
    tl.store(k_LBC + tile, rotate(k, cos, sin, BL, BC), mask=inside)


@triton.jit(do_not_specialize=["L", "B"])
def conv_rope_backward(
    x_LBC, wq_CW, wk_CW, cos_KF, sin_KF, dq_LBC, dk_LBC, dx_LBC, sums_N2WC,
    L, B, C, x_l, x_b,
    F: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid [tokens / BL, channels / BC, B]. sums_N2WC: of a block of tokens, for q's convolution
    and k's, the gradients of the W weights and, last, of the bias."""
    first, batch = tl.program_id(1) * BC, tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BL + tl.arange(0, BL)
    channels = first + tl.arange(0, BC)
    real = channels < C
    row = tokens[:, None].to(tl.int64)
    inside = (row < L) & real[None, :]
    x = tl.load(x_LBC + row * x_l + batch * x_b + channels, mask=inside, other=0).to(tl.float32)
    dx = tl.zeros((BL, BC), tl.float32)
    sums = sums_N2WC + (tl.program_id(0) * B + batch).to(tl.int64) * 2 * (W + 1) * C + channels
    for shift in tl.static_range(W):
        w = W - 1 - shift  # through which the output `shift` tokens on takes this one
        cos, sin = load_angles(cos_KF, sin_KF, tokens + shift, first, F, K, BC)
        tile = ((row + shift) * B + batch) * C + channels
        there = (row + shift < L) & real[None, :]
        dq = tl.load(dq_LBC + tile, mask=there, other=0).to(tl.float32)
        dk = tl.load(dk_LBC + tile, mask=there, other=0).to(tl.float32)
        dq, dk = rotate(dq, cos, -sin, BL, BC), rotate(dk, cos, -sin, BL, BC)
        dx += dq * tl.load(wq_CW + channels * W + w, mask=real, other=0).to(tl.float32)
        dx += dk * tl.load(wk_CW + channels * W + w, mask=real, other=0).to(tl.float32)
        tl.store(sums + w * C, tl.sum(dq * x, 0), mask=real)
        tl.store(sums + (W + 1 + w) * C, tl.sum(dk * x, 0), mask=real)
        if shift == 0:
            tl.store(sums + W * C, tl.sum(dq, 0), mask=real)
            tl.store(sums + (2 * W + 1) * C, tl.sum(dk, 0), mask=real)
    tl.store(dx_LBC + (row * B + batch) * C + channels, dx, mask=inside)


def conv_rope(x_LBC, convolutions, cos_KF, sin_KF) -> tuple[Tensor, Tensor]:
    """As `ops.conv_rope`."""
    (wq, bq), (wk, bk) = convolutions
    return ConvRotate.apply(x_LBC, wq, bq, wk, bk, cos_KF, sin_KF)


class ConvRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, wq, bq, wk, bk, cos, sin):
        x = x if x.stride(-1) == 1 else x.contiguous()
        wq, bq, wk, bk = (t.contiguous() for t in (wq, bq, wk, bk))
        q, k = x.new_empty(x.shape), x.new_empty(x.shape)
        ctx.sizes = {"F": 2 * cos.shape[1], "K": cos.shape[0], "W": wq.shape[-1]}
        launch(conv_rope_forward, x, wq, bq, wk, bk, cos, sin, q, k, **ctx.sizes)
        ctx.save_for_backward(x, wq, wk, cos, sin)
        return tuple(y.unflatten(-1, (-1, ctx.sizes["F"])).permute(1, 2, 0, 3) for y in (q, k))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        x, wq, wk, cos, sin = ctx.saved_tensors
        (L, B, C), W = x.shape, ctx.sizes["W"]
        dq, dk = (d.permute(2, 0, 1, 3).flatten(2).contiguous() for d in (dq, dk))
        dx = x.new_empty(x.shape)
        blocks = triton.cdiv(L, BLOCK["BL"]) * B
        sums = x.new_empty((blocks, 2, W + 1, C), dtype=torch.float32)
        launch(conv_rope_backward, x, wq, wk, cos, sin, dq, dk, dx, sums, **ctx.sizes)
        (dwq, dbq), (dwk, dbk) = (
            (d[:W].t().unsqueeze(1).to(wq.dtype), d[W].to(wq.dtype)) for d in sums.sum(0)
        )
        return dx, dwq, dbq, dwk, dbk, None, None


def launch(kernel, x_LBC, *tensors, **sizes):
    L, B, C = x_LBC.shape
    grid = triton.cdiv(L, BLOCK["BL"]), triton.cdiv(C, BLOCK["BC"]), B
    with torch.cuda.device_of(x_LBC):
        kernel[grid](x_LBC, *tensors, L, B, C, *x_LBC.stride()[:2], **sizes, **BLOCK)
