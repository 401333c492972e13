"""Learning rates as pure functions of the step, counted from 1 (docs/mathematics.md, recipe)."""

from __future__ import annotations

import math

import torch

from megatron_ttt.config import Config
from megatron_ttt.stack import architecture_of

INNER_LR_START = 0.1
"""Share of the inner learning rate that its warm-up starts from."""


def warmup_steps(config: Config) -> int:
    """Steps of the linear warm-up, of both learning rates."""
    return round(config.optimizer.warmup_fraction * config.training.steps)


def learning_rate(config: Config, step: int) -> float:
    """Linear from 0 to lr over the warm-up, then cosine towards min_lr.

    The paper's optimizer applies the schedule's value of the step before, so step 1 has rate 0, and
    min_lr would be the rate of the step after the last.
    """
    optimizer, warmup, done = config.optimizer, warmup_steps(config), step - 1
    if done < warmup:
        return optimizer.lr * done / warmup
    progress = min(1.0, (done - warmup) / max(1, config.training.steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * cosine


def inner_lr_scale(config: Config, step: int) -> float:
    """Factor of the inner learning rate: from 0.1 to 1 over the warm-up if there is one, else 1.

    Rounded to bfloat16, as the official trainer does in float32 runs too.
    """
    warm_up = config.optimizer.inner_lr_warmup
    if warm_up is None:
        warm_up = architecture_of(config).warms_inner_lr
    if not warm_up:
        return 1.0
    progress = min(1.0, (step - 1) / max(1, warmup_steps(config)))
    scale = INNER_LR_START + (1.0 - INNER_LR_START) * progress
    return torch.tensor(scale, dtype=torch.bfloat16).item()
