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
    """All of it for one c. PyTorch's own gelu serves where one call counts more than its time."""

    def __init__(self, c: float, like: Tensor):
        self.argument = like.new_tensor(2 * c), 2 * c * CUBIC
        self.slope = like.new_tensor(2 * c), 6 * c * CUBIC
        self.bend = like.new_tensor(4 * c), 24 * c * CUBIC
        self.one = like.new_ones(())

    def gate(self, x: Tensor, out: Tensor) -> Tensor:
        linear, cubic = self.argument
        return torch.addcmul(linear, x, x, value=cubic, out=out).mul_(x).sigmoid_()

    def derivative(self, x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """g + (1 - g) x g p."""
        constant, quadratic = self.slope
        torch.addcmul(constant, x, x, value=quadratic, out=out).mul_(x).mul_(gate)
        return torch.lerp(out, self.one, gate, out=out)

    def second_derivative(self, x: Tensor, gate: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """g (1 - g) (2p + x p' + x p^2 (1 - 2g))."""
        constant, quadratic = self.bend
        torch.addcmul(constant, x, x, value=quadratic, out=out)
        constant, quadratic = self.slope
        torch.addcmul(constant, x, x, value=quadratic, out=scratch).square_().mul_(x)
        out.add_(scratch).addcmul_(scratch, gate, value=-2)
        torch.addcmul(gate, gate, gate, value=-1, out=scratch)
        return out.mul_(scratch)
