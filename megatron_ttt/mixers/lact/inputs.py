"""From a LaCT layer's projections to what its attention and its fast weights read.

Legend: S tokens, B batch, D columns of this rank, H heads, F features of a head, L tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ttt.mixers.module import split_heads

L2_EPS = 1e-5


@lru_cache(maxsize=8)
def rotary_angles(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [L, F / 2] of positions from 0 on, taken in float64 and rounded once."""
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponent)
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate_halves(x_BHLF: Tensor, cos_LF: Tensor, sin_LF: Tensor) -> Tensor:
    """Rotate the pairs (p, p + F / 2); computed in the angles' dtype, returned in x's."""
    first, second = x_BHLF.to(cos_LF.dtype).chunk(2, dim=-1)
    rotated = [first * cos_LF - second * sin_LF, second * cos_LF + first * sin_LF]
    return torch.cat(rotated, dim=-1).to(x_BHLF.dtype)


def fast_input(
    x_SBD: Tensor,
    heads: int,
    scale_D: Tensor,
    offset_D: Tensor,
    *,
    silu: bool,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the fast weights' queries or keys [B, H, L, F] in x's dtype, by way of the scale's.

    They are scaled and shifted by channel, activated, divided by their norms and rotated; angles:
    of the attention heads, of which a fast head spans several; None: not rotated.
    """
    x = x_SBD.to(scale_D.dtype) * scale_D + offset_D
    x = split_heads(F.silu(x) if silu else x, heads)
    x = x / (x.norm(dim=-1, keepdim=True) + L2_EPS)
    if angles is not None:
        width = 2 * angles[0].shape[-1]
        parts = x.unflatten(-1, (-1, width)).transpose(2, 3)  # [B, H, parts, L, width]
        x = rotate_halves(parts, *angles).transpose(2, 3).flatten(3)
    return x.to(x_SBD.dtype)
