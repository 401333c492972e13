"""tanh-GELU and its first two derivatives, written with a sigmoid and into given tensors.

gelu(x) = x g with the gate g = sigmoid(2c (x + a x^3)), which is (1 + tanh(c (x + a x^3))) / 2.
Below, p = 2c (1 + 3a x^2) is the slope of the sigmoid's argument.

The official code takes X2 = gelu(Z1) with c = sqrt(2/pi), and the inner gradient's gelu'(Z1) with
c rounded to eight digits. In float32 the two are one number; in float64 they are not, and a
backward that is to be exact has to tell them apart.
"""

from math import pi, sqrt

import torch
from torch import Tensor

CUBIC = 0.044715
EXACT = sqrt(2 / pi)
ROUNDED = 0.79788456


class Gelu:
    """For one c; `like` gives dtype and device of the constants."""

    def __init__(self, c: float, like: Tensor):
        constants = 1.0, 4.0, 2 * c, -4 * c
        self.one, self.four, self.c2, self.minus_c4 = map(like.new_tensor, constants)
        self.cubic = 2 * c * CUBIC

    def gate(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(self.c2, x, x, value=self.cubic, out=out).mul_(x).sigmoid_()

    def derivative(self, x: Tensor, gate: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """g + (1 - g) x g p, with value = x g."""
        torch.addcmul(self.c2, x, x, value=3 * self.cubic, out=out).mul_(value)
        return torch.lerp(out, self.one, gate, out=out)

    def second_derivative(self, x: Tensor, gate: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """g (1 - g) (p (4 + (1 - 2g) x p) - 4c)."""
        p = torch.addcmul(self.c2, x, x, value=3 * self.cubic, out=scratch)
        torch.addcmul(x, x, gate, value=-2, out=out)
        torch.addcmul(self.four, out, p, out=out)
        torch.addcmul(self.minus_c4, out, p, out=out)
        return out.mul_(torch.addcmul(gate, gate, gate, value=-1, out=scratch))
