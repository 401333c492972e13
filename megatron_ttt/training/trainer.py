"""The training run: build, resume, loop, validate, save.

What a `Trainer` holds is what a step needs; everything that can be a function of it stands in the
modules beside this one.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ttt import platform as platforms
from megatron_ttt.checkpoint.manifest import replace_durably
from megatron_ttt.checkpoint.state import layout, load_checkpoint, load_weights
from megatron_ttt.config import Config, check_layout, to_dict, to_yaml
from megatron_ttt.data.batches import data_files, open_data
from megatron_ttt.data.fingerprint import fingerprints
from megatron_ttt.errors import TrainingError, UserError, run_on_rank0
from megatron_ttt.model import (
    build_chunks,
    initialise_weights,
    make_transformer_config,
    set_inner_lr_scale,
)
from megatron_ttt.planning import peak_flops, training_flops_per_token
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.loggers import check_loggers, log_line
from megatron_ttt.training.lost_ranks import Progress
from megatron_ttt.training.metrics import MetricsLog
from megatron_ttt.training.monitor import RunMonitor
from megatron_ttt.training.optimizer import (
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    set_options,
    step_optimizer,
    wrap_chunks,
)
from megatron_ttt.training.resume import find_checkpoint, is_own, quarantine_later_checkpoints
from megatron_ttt.training.saving import Saver
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate
from megatron_ttt.training.step import run_batches
from megatron_ttt.training.stopping import StopRequests


def start(config: Config) -> platforms.Platform:
    """Prepare this process: platform, process group, megatron's groups, seeds."""
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    platform = platforms.start(config.run.device, deterministic=config.training.deterministic)
    platforms.start_process_group(platform, config.run.timeout_minutes)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.run.timeout_minutes,
    )
    platforms.seed_everything(config.run.seed)
    return platform


class Trainer:
    """A run from its configuration to its last checkpoint.

    `step` counts the optimizer steps behind; `chunks` are the unwrapped model chunks of this rank.
    """

    def __init__(
        self,
        config: Config,
        platform: platforms.Platform,
        stop: StopRequests | None = None,
        progress: Progress | None = None,
    ):
        """stop: what can end the run early; None: nothing does. progress: kept up to date."""
        self.config, self.platform, self.stop = config, platform, stop
        self.progress = progress or Progress()
        self.run_dir = Path(config.run.dir)
        self.is_first_rank = dist.get_rank() == 0
        # Everything a user can have got wrong is looked at before the slow building.
        check_loggers(config)
        self.data_fingerprints = run_on_rank0(lambda: fingerprints(data_files(config)))
        self.resume_from = find_checkpoint(config, self.data_fingerprints)
        self.data = open_data(config)
        for note in self.data.notes if self.is_first_rank else ():
            log_line(note)

        self.chunks = build_chunks(config, make_transformer_config(config, platform))
        for chunk in self.chunks:
            initialise_weights(chunk, architecture_of(config), config.run.seed)
        self.ddp_chunks = wrap_chunks(config, self.chunks)
        self.optimizer = build_optimizer(config, self.ddp_chunks)
        self.step = 0
        self.saver = Saver(config, platform.device, stop)
        self.skipped_steps = self.bad_steps_in_a_row = 0
        self.last_validation = -1, math.nan  # step, loss
        self.monitor = RunMonitor(
            config, self.chunks, self.ddp_chunks, self.optimizer, self._run_forward
        )
        if self.resume_from is not None:
            self._resume()

    def _resume(self) -> None:
        checkpoint = self.resume_from
        if checkpoint.state["has_optimizer"]:
            load_checkpoint(checkpoint, self.config, self.chunks, self.optimizer)
            set_options(self.optimizer, self.config)
            self.monitor.check_loaded(checkpoint)
            self.step = checkpoint.step
            self.skipped_steps = checkpoint.state.get("skipped_steps", 0)
        else:
            load_weights(checkpoint, self.chunks)
            self.optimizer.reload_model_params()
        if self.is_first_rank:
            log_line(f"Resumed from {checkpoint.path} at step {self.step}")
        if is_own(checkpoint, self.run_dir):
            run_on_rank0(lambda: quarantine_later_checkpoints(checkpoint))

    def train(self) -> str | None:
        """Run the remaining steps; save and validate at the end.

        Returns why the run stopped before that, in words; it has saved then. Raises TrainingError
        for a run that cannot go on.
        """
        with self._open_log() or nullcontext() as log:
            reason = self._run_steps(log)
        if self.saver.failure is not None:
            self.saver.abandon_exports()
            raise TrainingError(
                f"the last checkpoint, of step {self.step}, was not saved ({self.saver.failure}): "
                "make room, and give the same command again"
            )
        if reason is None:
            self.progress.doing = "exporting"
            reason = self.saver.wait_for_exports(self._signalled)
        else:
            self.saver.abandon_exports()
        if reason is not None and self.is_first_rank:
            last = self.config.training.exit_step or self.config.training.steps
            log_line(f"Stopped at step {self.step} of {last}: {reason}. The same command goes on")
        return reason

    def _run_steps(self, log: MetricsLog | None) -> str | None:
        config = self.config
        last = config.training.exit_step or config.training.steps
        if self.step >= last and self.is_first_rank:
            log_line(f"Nothing to do: step {self.step} of {last} is behind")
        resumed = self.resume_from
        if self.is_first_rank and resumed is not None and is_own(resumed, self.run_dir):
            self.saver.export_what_is_missing(resumed.path, self.step)
        batches = self.data.train_batches(self.step, last)
        self._mode(training=True)
        reason = None
        if self.step < last:
            reason = self._signalled()  # during start-up: there is nothing new to save
        while self.step < last and reason is None:
            self.progress.step, self.progress.doing = self.step + 1, "training"
            started = time.perf_counter()
            microbatches = next(batches)
            waited = time.perf_counter() - started
            figures = self.train_step(microbatches)
            seconds = time.perf_counter() - started
            figures |= {"seconds": round(seconds, 4), "data_wait_share": round(waited / seconds, 4)}
            figures |= self.monitor.inner_metrics(self.step, microbatches)
            if log is not None:
                log.step(self.step, figures, self.platform.peak_memory_bytes())
            self.monitor.after_step(self.step, figures, microbatches, self.bad_steps_in_a_row)
            self.saver.poll()
            at_end = self.step == last
            if at_end or self._due(config.training.eval_every):
                self.validate(log)
            due = self._due(config.checkpoint.save_every) or self._milestone_due()
            reason = None if at_end else self._stop_reason()
            if at_end or due or reason is not None:
                if log is not None:
                    log.flush()
                self.save()
                if log is not None:
                    log.restart_rate()
                if not at_end and reason is None:
                    reason = self._stop_reason()  # a signal during the save: that was the last
        self.saver.wait()
        return reason

    def _signalled(self) -> str | None:
        return None if self.stop is None else self.stop.reason(self.platform.device)

    def _stop_reason(self) -> str | None:
        if self.stop is None:
            return None
        return self.stop.reason(self.platform.device, self.config.training.exit_after_minutes)

    def train_step(self, microbatches: list[torch.Tensor]) -> dict[str, float]:
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

    def _run(self, microbatches: list[torch.Tensor], *, forward_only: bool = False) -> torch.Tensor:
        """The loss of a global batch, of which these are this rank's microbatches: a scalar on the
        device."""
        ignored_target_id, device = self.data.ignored_target_id, self.platform.device
        return run_batches(
            self.ddp_chunks, microbatches, ignored_target_id, device, forward_only=forward_only
        )

    @torch.no_grad()
    def _run_forward(self, microbatches: list[torch.Tensor]) -> float:
        """As `_run`, without gradients, in evaluation mode, and read."""
        self._mode(training=False)
        loss = self._run(microbatches, forward_only=True).item()
        self._mode(training=True)
        return loss

    def validate(self, log: MetricsLog | None = None) -> float | None:
        """Mean loss over the validation sequences; None where there are none."""
        microbatches = self.data.validation_batches()
        if not microbatches:
            return None
        self.progress.doing = "validating"
        set_inner_lr_scale(self.chunks, 1.0)
        loss = self._run_forward(microbatches)
        self.last_validation = self.step, loss
        if log is not None:
            log.validation(self.step, loss)
        return loss

    def save(self) -> None:
        """Write checkpoint-STEP/, a milestone where one is due, and drop the oldest."""
        since = time.perf_counter()
        self.progress.doing = "saving"
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
        self.saver.save(
            self.chunks,
            self.optimizer,
            state,
            self.monitor.checks(self.step),
            milestone=self._milestone_due(),
            since=since,
        )

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def _milestone_due(self) -> bool:
        return self._due(self.config.checkpoint.milestone_every)

    def _mode(self, *, training: bool) -> None:
        for chunk in self.ddp_chunks:
            chunk.train(training)

    def _open_log(self) -> MetricsLog | None:
        """Rank 0's log, beside the resolved configuration; the others have none. Collective."""
        opened: list[MetricsLog] = []
        run_on_rank0(lambda: opened.append(self._new_log()))
        return opened[0] if opened else None

    def _new_log(self) -> MetricsLog:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            replace_durably(self.run_dir / "config.yaml", to_yaml(self.config))
        except OSError as error:
            raise UserError(f"cannot write to run.dir={self.run_dir}: {error.strerror}") from None
        peak = None
        if self.platform.kind == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
        flops = training_flops_per_token(
            architecture_of(self.config), self.config.training.seq_length
        )
        return MetricsLog(self.config, self.step, peak and peak * dist.get_world_size(), flops)
