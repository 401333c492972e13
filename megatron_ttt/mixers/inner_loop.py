"""What the trainer asks of a module that trains an inner model while it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class InnerStatistics(NamedTuple):
    """Of one layer. The first four are [N], one number a full mini-batch; the rest are scalars.

    Losses are the mean over batch, heads and features of (prediction - target)^2 for a mini-batch's
    last token; target_var, at its first, of (target - the target's mean over the sequence)^2.
    """

    loss_init: Tensor
    """With the state that the sequence starts from."""
    loss_before: Tensor
    """With the state before the mini-batch."""
    loss_after: Tensor
    """With the state after it."""
    target_var: Tensor
    """What predicting the target's mean would leave."""
    inner_lr: Tensor
    """Mean of lam, the keys' share of the inner learning rate."""
    token_scale: Tensor
    """Mean of tau, the positions' share."""
    token_scale_clamped: Tensor
    """Share of the positions whose tau is clamped at 0."""
    state_norm: Tensor
    """Norm of the state's matrices after the sequence, the mean over batch and heads."""
    state_norm_init: Tensor
    """The same of the state the sequence starts from."""
    finite: Tensor
    """Share of the keys, values and final state that are finite numbers."""


class InnerLoop:
    """A module that trains an inner model while it reads."""

    inner_lr_scale: float = 1.0
    """Multiplies the inner learning rate: the warm-up's factor; 1 in evaluation."""
    observer: Callable[[InnerStatistics], None] | None = None
    """Called with the statistics of each forward pass, where it is set."""
