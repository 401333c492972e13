"""tanh-GELU and its first two derivatives, in place and written with a sigmoid.

gelu(x) = x g, the gate g = sigmoid(2c (x + a x^3)) being (1 + tanh(c (x + a x^3))) / 2.
The slope of the sigmoid's argument is p = 2c (1 + 3a x^2).

The official code takes X2 = gelu(Z1) with c = sqrt(2/pi), and the inner gradient's gelu'(Z1) with
c rounded to eight digits. In float32 the two are one number; in float64 they differ, and the
gradient of the scan has to differentiate what its forward computed.
"""

from math import pi, sqrt

import torch
from torch import Tensor

CUBIC = 0.044715
EXACT = sqrt(2 / pi)
ROUNDED = 0.79788456


class Gelu:
    def __init__(self, c: float, like: Tensor):
        self.one = like.new_ones(())
        self.c2, self.c4 = like.new_tensor(2 * c), like.new_tensor(4 * c)
        self.cubic = 2 * c * CUBIC

    def forward(self, x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """x g; leaves g in `gate`."""
        torch.addcmul(self.c2, x, x, value=self.cubic, out=gate).mul_(x).sigmoid_()
        return torch.mul(x, gate, out=out)

    def derivative(self, x: Tensor, gate: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """g + (1 - g) x g p."""
        torch.addcmul(self.c2, x, x, value=3 * self.cubic, out=out).mul_(value)
        return torch.lerp(out, self.one, gate, out=out)

    def second_derivative(self, x: Tensor, gate: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """g (1 - g) (2p + x p' + x p^2 (1 - 2g))."""
        torch.addcmul(self.c4, x, x, value=12 * self.cubic, out=out)
        torch.addcmul(self.c2, x, x, value=3 * self.cubic, out=scratch).square_().mul_(x)
        out.add_(scratch).addcmul_(scratch, gate, value=-2)
        torch.addcmul(gate, gate, gate, value=-1, out=scratch)
        return out.mul_(scratch)
