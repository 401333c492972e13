"""The training run: build, resume, loop, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ttt.checkpoint.state import layout
from megatron_ttt.config import Config, to_dict
from megatron_ttt.data.batches import data_files, open_data
from megatron_ttt.data.fingerprint import fingerprints
from megatron_ttt.errors import run_on_rank0
from megatron_ttt.model import (
    build_chunks,
    initialise_weights,
    make_transformer_config,
    set_inner_lr_scale,
)
from megatron_ttt.platform import Platform
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.loggers import check_loggers, log_on_rank0
from megatron_ttt.training.metrics import MetricsLog
from megatron_ttt.training.monitor import AnomalyWatch, InnerMetrics, ReplicaCheck
from megatron_ttt.training.optimizer import (
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    step_optimizer,
    wrap_chunks,
)
from megatron_ttt.training.resume import find_checkpoint, restore
from megatron_ttt.training.saving import Saver
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate
from megatron_ttt.training.step import run_batches
from megatron_ttt.training.stopping import StopRequests


class Trainer:
    """A run from its configuration to its last checkpoint.

    `step` counts the optimizer steps done; `chunks` are the unwrapped model chunks of this rank,
    `ddp_chunks` the same wrapped. All methods but `is_due` are collective.
    """

    def __init__(
        self,
        config: Config,
        platform: Platform,
        stop: StopRequests | None = None,
        hooks: Sequence[Hook] = (),
    ):
        """Build the model and load the checkpoint that `config.checkpoint.load` asks for.

        stop: what can end the run early; None: nothing does. hooks: your own (see `Hook`), called
        in this order and before the log. Raises UserError for what cannot be trained.
        """
        self.config, self.platform, self.stop = config, platform, stop
        self.run_dir = Path(config.run.dir)
        # Everything a user can have got wrong is looked at before the slow building.
        check_loggers(config)
        self.data_fingerprints = run_on_rank0(lambda: fingerprints(data_files(config)))
        checkpoint = self.resume_from = find_checkpoint(config, self.data_fingerprints)
        self.data = open_data(config)
        for note in self.data.notes:
            log_on_rank0(note)

        self.chunks = build_chunks(config, make_transformer_config(config, platform))
        for chunk in self.chunks:
            initialise_weights(chunk, architecture_of(config), config.run.seed)
        self.ddp_chunks = wrap_chunks(config, self.chunks)
        self.optimizer = build_optimizer(config, self.ddp_chunks)
        self.step = self.skipped_steps = self.bad_steps_in_a_row = 0
        self.last_validation = -1, math.nan  # step, loss
        self.saver = Saver(config, platform.device, stop)
        if checkpoint is not None:
            self.step, self.skipped_steps = restore(checkpoint, self.chunks, self.optimizer, config)
        # In this order: figures are complete before they are logged, and logged before a check
        # ends the run; what the checks find comes before the next checkpoint is published.
        log = MetricsLog(config, platform)
        self.hooks = [InnerMetrics(), *hooks, log, AnomalyWatch(), ReplicaCheck(), self.saver]

    def train(self) -> str | None:
        """Run the remaining steps; save and validate at the end.

        Returns why the run stopped before that, in words; it has saved then. Raises TrainingError
        for a run that cannot go on.
        """
        try:
            for hook in self.hooks:
                hook.on_train_start(self)
            reason = self._run_steps()
        except BaseException as error:
            for hook in self.hooks:
                hook.on_train_end(self, error)
            raise
        for hook in self.hooks:
            hook.on_train_end(self, None)
        reason = self.saver.finish(self.step, reason, self._stop_reason)
        if reason is not None:
            at = f"step {self.step} of {self._last_step}"
            log_on_rank0(f"Stopped at {at}: {reason}. The same command goes on")
        return reason

    def _run_steps(self) -> str | None:
        """Train until the last step or a reason to stop, which is returned."""
        training, checkpoint, last = self.config.training, self.config.checkpoint, self._last_step
        if self.step >= last:
            log_on_rank0(f"Nothing to do: step {self.step} of {last} is behind")
        batches = self.data.train_batches(self.step, last)
        # A signal during start-up: there is nothing new to save.
        reason = self._stop_reason() if self.step < last else None
        while self.step < last and reason is None:
            for hook in self.hooks:
                hook.on_step_start(self)
            started = time.perf_counter()
            microbatches = next(batches)
            waited = time.perf_counter() - started
            figures = self.train_step(microbatches)
            seconds = time.perf_counter() - started
            figures |= {"seconds": round(seconds, 4), "data_wait_share": round(waited / seconds, 4)}
            for hook in self.hooks:
                hook.on_step_end(self, figures, microbatches)
            at_end = self.step == last
            if at_end or self.is_due(training.eval_every):
                self.validate()
            if not at_end:
                reason = self._stop_reason(training.exit_after_minutes)
            due = self.is_due(checkpoint.save_every) or self.is_due(checkpoint.milestone_every)
            if at_end or due or reason is not None:
                self.save()
                if not at_end and reason is None:  # a signal during the save: that was the last
                    reason = self._stop_reason(training.exit_after_minutes)
        self.saver.wait()
        return reason

    def train_step(self, microbatches: list[Tensor]) -> dict[str, float]:
        """One optimizer step on this rank's microbatches; returns what it measured.

        The host runs ahead of the device and reads from it once, when all is launched.
        """
        step = self.step + 1
        scale = inner_lr_scale(self.config, step)
        rate = learning_rate(self.config, step)
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_inner_lr_scale(self.chunks, scale)
        loss = self._run(microbatches)
        set_learning_rate(self.optimizer, rate)
        grad_norm, skipped = step_optimizer(self.optimizer, loss)
        loss, grad_norm, skipped = torch.stack([loss, grad_norm, skipped]).tolist()
        self.step = step
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if skipped else 0
        self.skipped_steps += bool(skipped)
        figures = {"loss": loss, "lr": rate, "grad_norm": grad_norm}
        if architecture_of(self.config).has_inner_loop:
            figures["ttt_lr_mult"] = scale
        if self.skipped_steps:
            figures["skipped_steps"] = self.skipped_steps
        return figures

    def validate(self) -> float | None:
        """Return the mean loss over the validation sequences; None where there are none."""
        microbatches = self.data.validation_batches()
        if not microbatches:
            return None
        for hook in self.hooks:
            hook.on_validation_start(self)
        set_inner_lr_scale(self.chunks, 1.0)
        loss = self.run_forward(microbatches)
        self.last_validation = self.step, loss
        for hook in self.hooks:
            hook.on_validation_end(self, loss)
        return loss

    def save(self) -> None:
        """Write checkpoint-STEP/, a milestone where one is due, and drop the oldest."""
        for hook in self.hooks:
            hook.on_save_start(self)
        since = time.perf_counter()
        gather_parameters(self.ddp_chunks)
        state = {
            "step": self.step,
            "layout": layout(self.config),
            "config": to_dict(self.config),
            "skipped_steps": self.skipped_steps,
            "data": self.data_fingerprints,  # rank 0's, which writes this
        }
        validated_step, loss = self.last_validation
        if validated_step == self.step:
            state["val_loss"] = loss
        milestone = self.is_due(self.config.checkpoint.milestone_every)
        self.saver.save(self.chunks, self.optimizer, state, milestone=milestone, since=since)
        for hook in self.hooks:
            hook.on_save_end(self)

    @torch.no_grad()
    def run_forward(self, microbatches: list[Tensor]) -> float:
        """Return the loss of a global batch in evaluation mode, without gradients."""
        for chunk in self.ddp_chunks:
            chunk.eval()
        loss = self._run(microbatches, forward_only=True).item()
        for chunk in self.ddp_chunks:
            chunk.train()
        return loss

    def is_due(self, every: int | None) -> bool:
        """Whether what happens every so many steps happens at this one; None or 0: never."""
        return bool(every) and self.step % every == 0

    def _run(self, microbatches: list[Tensor], *, forward_only: bool = False) -> Tensor:
        """Return the global batch's loss, a scalar on the device."""
        ignored_target_id, device = self.data.ignored_target_id, self.platform.device
        return run_batches(
            self.ddp_chunks, microbatches, ignored_target_id, device, forward_only=forward_only
        )

    @property
    def _last_step(self) -> int:
        return self.config.training.exit_step or self.config.training.steps

    def _stop_reason(self, after_minutes: float | None = None) -> str | None:
        """Why to stop now: a signal, or that the run has taken this long."""
        if self.stop is None:
            return None
        return self.stop.reason(self.platform.device, after_minutes)
