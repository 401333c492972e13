"""The way from a projection to the scan's queries and keys: causal convolution, heads, RoPE.

Legend: L tokens, B batch, C channels = H heads of F features, W width of the convolution, K
mini-batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttt.ops.fused import can_use_fused_kernels
from megatron_ttt.ops.rope import rotate_pairs


def conv_rope(
    x_LBC: Tensor, convolutions: list[tuple[Tensor, Tensor]], cos_KF: Tensor, sin_KF: Tensor
) -> list[Tensor]:
    """For the two convolutions, (weight [C, 1, W], bias [C]) each: RoPE(heads(conv(x))).

    Args:
        x_LBC: channels adjacent; batch and sequence may be strided.
        cos_KF, sin_KF: the angles [K, F / 2] of a mini-batch's positions (`mini_batch_angles`).

    Returns:
        [B, H, L, F] each, in x's dtype, token by token in memory. Computed in at least float32; the
        kernel rounds once, at the end, plain PyTorch between convolution and rotation too.
    """
    if can_use_fused_kernels(x_LBC):
        from megatron_ttt.ops.triton.conv_rope import conv_rope

        return conv_rope(x_LBC, convolutions, cos_KF, sin_KF)
    return reference_conv_rope(x_LBC, convolutions, cos_KF, sin_KF)


def reference_conv_rope(x_LBC, convolutions, cos_KF, sin_KF) -> list[Tensor]:
    """`conv_rope` in PyTorch."""
    F = 2 * cos_KF.shape[-1]
    convolved = (causal_conv(x_LBC, weight, bias) for weight, bias in convolutions)
    heads = (y.unflatten(-1, (-1, F)).permute(1, 2, 0, 3) for y in convolved)
    return [rotate_pairs(y, cos_KF, sin_KF) for y in heads]


def causal_conv(
    x_LBC: Tensor, weight_C1W: Tensor, bias_C: Tensor, halo_WBC: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution of tokens, preceded by the W-1 tokens `halo_WBC` (zeros at a
    sequence's start); in at least float32, returned in x's dtype."""
    if halo_WBC is None:
        halo_WBC = x_LBC.new_zeros((weight_C1W.shape[-1] - 1, *x_LBC.shape[1:]))
    dtype = torch.promote_types(x_LBC.dtype, torch.float32)
    padded = torch.cat([halo_WBC, x_LBC]).to(dtype)
    out = bias_C.to(dtype)
    for shift, weight_C in enumerate(weight_C1W.to(dtype).squeeze(1).t()):
        out = torch.addcmul(out, padded[shift : shift + x_LBC.shape[0]], weight_C)
    return out.to(x_LBC.dtype)
