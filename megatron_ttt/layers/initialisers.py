"""How parameters start: functions that fill a tensor from a stream of random numbers.

A generator of None is torch's own on the tensor's device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Initialiser = Callable[[Tensor, torch.Generator | None], None]


def zeros(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Biases, delta, b0."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Scales of norms."""
    tensor.fill_(1.0)


def normal(std: float) -> Initialiser:
    """N(0, std)."""

    def fill(tensor: Tensor, generator: torch.Generator | None) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def lecun_normal(fan_in: int) -> Initialiser:
    """JAX's lecun_normal: N(0, 1/fan_in) cut at two sigma, widened to keep that variance."""
    std = fan_in**-0.5 / 0.87962566103423978

    def fill(tensor: Tensor, generator: torch.Generator | None) -> None:
        nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std, generator=generator)

    return fill
