"""Hooks that look after a run between its steps: the inner loop, spikes, bad steps, replicas."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ttt.errors import TrainingError
from megatron_ttt.mixers.inner_loop import InnerStatistics
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.anomalies import SpikeWatch, first_nonfinite_module
from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.inner_loop import (
    inner_metrics,
    inner_table,
    observe_inner_loop,
    sample_of,
)
from megatron_ttt.training.loggers import log_on_rank0
from megatron_ttt.training.optimizer import gather_parameters
from megatron_ttt.training.optimizer_checks import compare_checksums, compute_checksums

if TYPE_CHECKING:
    from megatron_ttt.training.trainer import Trainer

REPORT_PAUSE = 100
"""Least steps between two reports of the inner loop's health."""


class InnerMetrics(Hook):
    """Add the inner loop's figures to a step's, every `logging.inner_statistics_every` steps."""

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        if trainer.is_due(trainer.config.logging.inner_statistics_every):
            figures |= inner_metrics(_inner_statistics(trainer, microbatches))


class AnomalyWatch(Hook):
    """Warn of what is out of the ordinary; raise TrainingError for what cannot go on."""

    def __init__(self) -> None:
        self.spike_watches = {name: SpikeWatch(name) for name in ("loss", "grad_norm")}
        self.reported_at = -REPORT_PAUSE

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        step, bad_steps = trainer.step, trainer.bad_steps_in_a_row
        seen = [watch.see(figures[name]) for name, watch in self.spike_watches.items()]
        warnings = [warning for warning in seen if warning is not None]
        for warning in warnings:
            log_on_rank0(f"Warning at step {step}: {warning}")
        give_up = bad_steps >= trainer.config.training.max_bad_steps
        if give_up or ((warnings or bad_steps) and step - self.reported_at >= REPORT_PAUSE):
            self._report_inner_loop(trainer, microbatches)
        if give_up:
            run_forward = partial(trainer.run_forward, microbatches)
            raise TrainingError(
                f"{bad_steps} steps in a row were not finite, the last step {step}; first not "
                f"finite is {first_nonfinite_module(trainer.chunks, run_forward)}. Go back to an "
                "earlier checkpoint (checkpoint.load) with a lower optimizer.lr"
            )

    def _report_inner_loop(self, trainer: Trainer, microbatches: list[Tensor]) -> None:
        if not architecture_of(trainer.config).has_inner_loop:
            return
        self.reported_at = trainer.step
        table = inner_table(_inner_statistics(trainer, microbatches))
        log_on_rank0(f"The inner loop at step {trainer.step}:\n{table}")


class ReplicaCheck(Hook):
    """Raise TrainingError where copies of weights or of optimizer state differ, every
    `training.check_replicas_every` steps."""

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        if trainer.is_due(trainer.config.training.check_replicas_every):
            gather_parameters(trainer.ddp_chunks)
            seen = compute_checksums(trainer.chunks, trainer.optimizer)
            compare_checksums(seen, trainer.step, trainer.platform.device)


def _inner_statistics(trainer: Trainer, microbatches: list[Tensor]) -> dict[int, InnerStatistics]:
    """On a few of these sequences, with weights and inner learning rate as they are."""
    run_forward = partial(trainer.run_forward, sample_of(microbatches))
    return observe_inner_loop(trainer.chunks, run_forward)
