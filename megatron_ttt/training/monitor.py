"""Looking after a run between its steps: spikes, bad steps, copies that differ, the inner loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.checkpoint.writer import Checks
from megatron_ttt.config import Config
from megatron_ttt.errors import TrainingError
from megatron_ttt.mixers.inner_loop import InnerStatistics
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.anomalies import SpikeWatch, first_nonfinite_module
from megatron_ttt.training.inner_loop import (
    inner_metrics,
    inner_table,
    observe_inner_loop,
    sample_of,
)
from megatron_ttt.training.loggers import log_line
from megatron_ttt.training.optimizer import gather_parameters
from megatron_ttt.training.optimizer_checks import (
    compare_checksums,
    compute_checksums,
    first_difference,
    optimizer_checksums,
    to_json,
)

REPORT_PAUSE = 100
"""Least steps between two reports of the inner loop's health."""


class RunMonitor:
    """What is looked at after each step. All its methods are collective."""

    def __init__(
        self,
        config: Config,
        chunks: list[nn.Module],
        ddp_chunks: list[DistributedDataParallel],
        optimizer,
        run_forward: Callable[[list[Tensor]], object],
    ):
        """run_forward: passes microbatches through the chunks, without gradients."""
        self.config, self.chunks, self.ddp_chunks = config, chunks, ddp_chunks
        self.optimizer, self.run_forward = optimizer, run_forward
        self.spike_watches = {name: SpikeWatch(name) for name in ("loss", "grad_norm")}
        self.reported_at = -REPORT_PAUSE
        self.device = next(chunks[0].parameters()).device

    def inner_metrics(self, step: int, microbatches: list[Tensor]) -> dict[str, float]:
        """The inner loop's figures for the log, at the steps that want them; else none."""
        every = self.config.logging.inner_statistics_every
        if not every or step % every:
            return {}
        return inner_metrics(self._inner_statistics(microbatches))

    def after_step(
        self, step: int, figures: dict[str, float], microbatches: list[Tensor], bad_steps: int
    ) -> None:
        """Warn of what is out of the ordinary; raise TrainingError for what cannot go on.

        bad_steps: how many in a row, this one the last, were not finite.
        """
        seen = [watch.see(figures[name]) for name, watch in self.spike_watches.items()]
        warnings = [warning for warning in seen if warning is not None]
        for warning in warnings:
            self._say(f"Warning at step {step}: {warning}")
        give_up = bad_steps >= self.config.training.max_bad_steps
        if give_up or ((warnings or bad_steps) and step - self.reported_at >= REPORT_PAUSE):
            self._report_inner_loop(step, microbatches)
        if give_up:
            place = first_nonfinite_module(self.chunks, partial(self.run_forward, microbatches))
            raise TrainingError(
                f"{bad_steps} steps in a row were not finite, the last step {step}; first not "
                f"finite is {place}. Go back to an earlier checkpoint (checkpoint.load) with a "
                "lower optimizer.lr"
            )
        every = self.config.training.check_replicas_every
        if every and step % every == 0:
            gather_parameters(self.ddp_chunks)
            compare_checksums(compute_checksums(self.chunks, self.optimizer), step, self.device)

    def checks(self, step: int) -> Checks:
        """For a save with current weights: are copies what they must be, and what is in the
        optimizer, for state.json. Raises TrainingError where that cannot be published."""
        return Checks(
            compute=partial(compute_checksums, self.chunks, self.optimizer),
            compare=lambda seen: {
                "optimizer_checksums": compare_checksums(seen, step, self.device)
            },
        )

    def check_loaded(self, checkpoint: Checkpoint) -> None:
        """Raise TrainingError unless the optimizer is what it was when the checkpoint was saved."""
        saved = checkpoint.state.get("optimizer_checksums")
        if saved is None:
            return
        seen = compute_checksums(self.chunks, self.optimizer)
        loaded = to_json(optimizer_checksums(seen, self.device)[0])
        if difference := first_difference(saved, loaded):
            raise TrainingError(
                f"{checkpoint.path} does not give back the optimizer that was saved ({difference} "
                "differs): it was damaged in memory; go back to an earlier one (checkpoint.load)"
            )

    def _inner_statistics(self, microbatches: list[Tensor]) -> dict[int, InnerStatistics]:
        """On a few of these sequences, with weights and inner learning rate as they are."""
        forward = partial(self.run_forward, sample_of(microbatches))
        return observe_inner_loop(self.chunks, forward)

    def _report_inner_loop(self, step: int, microbatches: list[Tensor]) -> None:
        if not architecture_of(self.config).has_inner_loop:
            return
        self.reported_at = step
        table = inner_table(self._inner_statistics(microbatches))
        self._say(f"The inner loop at step {step}:\n{table}")

    def _say(self, message: str) -> None:
        if dist.get_rank() == 0:
            log_line(message)
