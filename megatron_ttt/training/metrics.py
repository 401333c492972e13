"""A run's figures: what a record of a step holds, and what the terminal shows of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttt.checkpoint.manifest import replace_durably
from megatron_ttt.config import Config, to_yaml
from megatron_ttt.errors import UserError, run_on_rank0
from megatron_ttt.planning import peak_flops, training_flops_per_token
from megatron_ttt.planning.cost import GIB
from megatron_ttt.platform import Platform
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.live import LiveView
from megatron_ttt.training.loggers import Logger, log_line, open_loggers

if TYPE_CHECKING:
    from megatron_ttt.training.trainer import Trainer


class MetricsLog(Hook):
    """The log of a run, beside its resolved configuration, which rank 0 alone writes.

    A step's record: loss, lr, grad_norm, ttt_lr_mult (TTT), skipped_steps (if any), seconds,
    data_wait_share (of them), tokens, tokens_per_second, mfu (where the GPU's peak is known),
    memory_gib (this rank's peak), `inner/layer_NN/...` where they were taken. A validation's:
    val_loss.
    """

    def __init__(self, config: Config, platform: Platform):
        training = config.training
        self.config, self.platform = config, platform
        self.is_first_rank = dist.get_rank() == 0
        self.log_every, self.last_step = training.log_every, training.exit_step or training.steps
        self.tokens_per_step = training.global_batch_size * training.seq_length
        self.flops_per_token = training_flops_per_token(
            architecture_of(config), training.seq_length
        )
        self.peak_flops = None  # of all devices together
        if platform.kind == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())):
            self.peak_flops = peak * dist.get_world_size()
        self.loggers: list[Logger] = []
        self.live: LiveView | None = None
        self.first_step_done: tuple[int, float] | None = None
        self._restart_rate()

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the log; raise UserError on all ranks where that fails."""
        run_on_rank0(lambda: self._open(trainer.step))
        self._restart_rate()

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        """Record a training step; print the first, the last and every `training.log_every`."""
        if not self.is_first_rank:
            return
        step = trainer.step
        self.steps_since += 1
        now = time.perf_counter()
        rate = self.steps_since * self.tokens_per_step / (now - self.since)
        record = {"step": step, **figures, "tokens": step * self.tokens_per_step}
        record["tokens_per_second"] = round(rate, 1)
        if self.peak_flops:
            record["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
        record["memory_gib"] = round(self.platform.peak_memory_bytes() / GIB, 3)
        self._write(record)
        seconds_left = self._seconds_left(step, now, self.tokens_per_step / rate)
        if self.live is not None:
            self.live.step(record, duration(seconds_left))
        if step % self.log_every == 0 or step in (1, self.last_step):
            if self.live is None:
                log_line(f"Step {step}: {_in_words(record)}, eta={duration(seconds_left)}")
            self._restart_rate()

    def on_validation_end(self, trainer: Trainer, loss: float) -> None:
        """Record a validation loss."""
        if not self.is_first_rank:
            return
        self._write({"step": trainer.step, "val_loss": loss})
        perplexity = math.exp(min(loss, 50))
        log_line(f"Validation at step {trainer.step}: loss={loss:.4f}, perplexity={perplexity:.2f}")
        self._restart_rate()

    def on_save_start(self, trainer: Trainer) -> None:
        """Flush: what is recorded must outlive this process, as the checkpoint does."""
        for logger in self.loggers:
            logger.flush()

    def on_save_end(self, trainer: Trainer) -> None:
        """Leave the save out of the tokens per second."""
        self._restart_rate()

    def on_train_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Close what was opened."""
        if self.live is not None:
            self.live.close()
        for logger in self.loggers:
            logger.close(failed=error is not None)

    def _open(self, first_step: int) -> None:
        """On rank 0. first_step: the step the run goes on from."""
        run_dir = Path(self.config.run.dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            replace_durably(run_dir / "config.yaml", to_yaml(self.config))
        except OSError as error:
            raise UserError(f"cannot write to run.dir={run_dir}: {error.strerror}") from None
        self.loggers = open_loggers(self.config, first_step)
        if self.config.logging.live:
            self.live = LiveView.open(self.config, first_step)

    def _restart_rate(self) -> None:
        """Tokens per second are of the steps from now on; call it after what is no step."""
        self.since, self.steps_since = time.perf_counter(), 0

    def _seconds_left(self, step: int, now: float, seconds_per_step: float) -> float:
        """At the pace since this process's first step, which compiles: with validations and saves,
        which a single step's seconds leave out."""
        if self.first_step_done is None:
            self.first_step_done = step, now
        else:
            first, since = self.first_step_done
            seconds_per_step = (now - since) / (step - first)
        return (self.last_step - step) * seconds_per_step

    def _write(self, record: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.write(record)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _in_words(record: dict[str, Any]) -> str:
    fields = [
        f"loss={record['loss']:.4f}",
        f"lr={record['lr']:.2e}",
        f"grad_norm={record['grad_norm']:.3f}",
        f"tokens/s={record['tokens_per_second']:,.0f}",
    ]
    if "mfu" in record:
        fields.append(f"mfu={record['mfu']:.1%}")
    fields.append(f"memory={record['memory_gib']:.2f}GiB")
    return ", ".join(fields)
