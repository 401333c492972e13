"""tanh-GELU with its first two derivatives, written with a sigmoid.

gelu(x) = x g with the gate g = sigmoid(2c (x + a x^3)), which is (1 + tanh(c (x + a x^3))) / 2.
Its slope is the derivative of the sigmoid's argument, 2c (1 + 3 a x^2).

The official code takes X2 = gelu(Z1) with c = sqrt(2/pi), and the inner gradient's gelu'(Z1) with
c rounded to eight digits. In float32 the two are the same number; in float64 they are not, and
the gradient of the scan differentiates what the forward computed.
"""

from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

CUBIC = 0.044715
EXACT = sqrt(2 / pi)
ROUNDED = 0.79788456


class Gelu(NamedTuple):
    """gelu at x, with what its derivatives are made of."""

    x: Tensor
    gate: Tensor
    value: Tensor
    slope: Tensor
    c: float


def gelu(x: Tensor, c: float, out: Tensor) -> Gelu:
    """x g; the value is written to `out`."""
    gate = torch.addcmul(x.new_tensor(2 * c), x, x, value=2 * c * CUBIC).mul_(x).sigmoid_()
    slope = torch.addcmul(x.new_tensor(2 * c), x, x, value=6 * c * CUBIC)
    return Gelu(x, gate, torch.mul(x, gate, out=out), slope, c)


def derivative(at: Gelu, out: Tensor) -> Tensor:
    """g + (1 - g) * x g * slope."""
    torch.mul(at.value, at.slope, out=out)
    return torch.lerp(out, out.new_ones(()), at.gate, out=out)


def second_derivative(at: Gelu, out: Tensor) -> Tensor:
    """g (1 - g) (2 slope + x slope' + x slope^2 (1 - 2 g))."""
    x, gate, value, slope, c = at
    torch.addcmul(x.new_tensor(4 * c), x, x, value=24 * c * CUBIC, out=out)
    out.addcmul_(slope * slope, torch.sub(x, value, alpha=2))
    return out.mul_(torch.addcmul(gate, gate, gate, value=-1))
