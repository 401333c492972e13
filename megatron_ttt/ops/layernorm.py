"""LayerNorm in the inner loop: the inner loss's gradient through it, and that gradient's backward.

Everything works on rows of F features. Pi is LayerNorm's backward, a linear map of rows:
Pi(y) = (y - mean(y) - Z_hat * mean(y * Z_hat)) / s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LN_EPS = 1e-6


class Normalised(NamedTuple):
    """Rows Z, Z_hat = LN(Z), and the statistics: mean and 1/s, s = sqrt(var + eps)."""

    Z: Tensor
    Z_hat: Tensor
    mean: Tensor
    rstd: Tensor


def normalise(Z: Tensor) -> Normalised:
    return Normalised(Z, *torch.native_layer_norm(Z, Z.shape[-1:], None, None, LN_EPS))


def project(y: Tensor, norm: Normalised) -> Tensor:
    """Pi(y) at the given rows."""
    return torch.ops.aten.native_layer_norm_backward(
        y, norm.Z, norm.Z.shape[-1:], norm.mean, norm.rstd, None, None, [True, False, False]
    )[0]


class InnerGradient:
    """G = dl/dZ of the inner loss l = 1/2 ||gamma * LN(Z) + offset||^2, and its backward.

    `offset` is beta minus the target. With u = gamma * (gamma * Z_hat + offset), G = Pi(u).
    """
