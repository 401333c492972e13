"""Rotary embedding of the TTT mixer: interleaved pairs, positions counted within a mini-batch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def mini_batch_angles(
    mini_batch_size: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [mini_batch_size, head_dim / 2] in `dtype`, on its device.

    They are taken in float64 and rounded once, and kept: a step copies nothing to the device.
    """
    with torch.inference_mode(False):
        position = torch.arange(mini_batch_size, dtype=torch.float64)
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = torch.outer(position, theta**-exponent)
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate_pairs(x: Tensor, cos_KF: Tensor, sin_KF: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [..., length, head_dim] by the angles [K, head_dim / 2].

    Token t has position t mod K. Computed in the angles' dtype, returned in x's.
    """
    position = torch.arange(x.shape[-2], device=x.device) % len(cos_KF)
    cos, sin = cos_KF[position], sin_KF[position]
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
