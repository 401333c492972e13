"""Rotary embedding of the TTT mixer: interleaved pairs, positions counted within a mini-batch."""

from __future__ import annotations

import torch
from torch import Tensor


def mini_batch_angles(
    length: int, mini_batch_size: int, head_dim: int, theta: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim / 2], float32 (float64 for a float64 model), on its device.

    Token t has position t mod K; the angles are taken in float64 and rounded once.
    """
    position = torch.arange(length, dtype=torch.float64) % mini_batch_size
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(position, theta**-exponent)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(like.device, dtype), angle.sin().to(like.device, dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [..., length, head_dim] by the angles [length, head_dim/2].

    Computed in the angles' dtype, returned in x's.
    """
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
