"""LayerNorm over the last dimension (F features), without affine part, and its backward Pi.

Pi is a linear map of rows: Pi(y) = (y - mean(y) - Z_hat * mean(y * Z_hat)) / s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LN_EPS = 1e-6

_backward = torch.ops.aten.native_layer_norm_backward.default
_INPUT_ONLY = [True, False, False]


class Normalised(NamedTuple):
    """Rows Z, Z_hat = LN(Z), and the statistics: the mean and 1/s, s = sqrt(var + eps)."""

    Z: Tensor
    hat: Tensor
    mean: Tensor
    rstd: Tensor


def normalise(Z: Tensor) -> Normalised:
    return Normalised(Z, *torch.native_layer_norm(Z, Z.shape[-1:], None, None, LN_EPS))


def normalise_again(Z: Tensor, mean: Tensor, rstd: Tensor) -> Normalised:
    """With the statistics known."""
    return Normalised(Z, (Z - mean).mul_(rstd), mean, rstd)


def project(y: Tensor, norm: Normalised) -> Tensor:
    """Pi(y) at the given rows."""
    Z, _, mean, rstd = norm
    return _backward(y, Z, Z.shape[-1:], mean, rstd, None, None, _INPUT_ONLY)[0]
