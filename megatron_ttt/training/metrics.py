"""A run's figures: what a record of a step holds, and what the terminal shows of it."""

from __future__ import annotations

import math
import time
from typing import Any

from megatron_ttt.config import Config
from megatron_ttt.planning.cost import GIB
from megatron_ttt.training.live import LiveView
from megatron_ttt.training.loggers import log_line, open_loggers


class MetricsLog:
    """Rank 0's log of a run; a context manager that closes what it opened.

    A step's record: loss, lr, grad_norm, ttt_lr_mult (TTT), skipped_steps (if any), seconds,
    data_wait_share (of them), tokens, tokens_per_second, mfu (where the GPU's peak is known),
    memory_gib (this rank's peak), `inner/layer_NN/...` where they were taken. A validation's:
    val_loss.
    """

    def __init__(
        self,
        config: Config,
        first_step: int,
        peak_flops: float | None,
        flops_per_token: float,
    ):
        """first_step: the step the run goes on from. peak_flops: of all devices together."""
        training = config.training
        self.log_every, self.last_step = training.log_every, training.exit_step or training.steps
        self.tokens_per_step = training.global_batch_size * training.seq_length
        self.peak_flops, self.flops_per_token = peak_flops, flops_per_token
        self.loggers = open_loggers(config, first_step)
        self.live = LiveView.open(config, first_step) if config.logging.live else None
        self.first_step_done: tuple[int, float] | None = None
        self.restart_rate()

    def step(self, step: int, figures: dict[str, float], memory_bytes: int) -> None:
        """Record a training step; print the first, the last and every `training.log_every`."""
        self.steps_since += 1
        now = time.perf_counter()
        rate = self.steps_since * self.tokens_per_step / (now - self.since)
        record = {"step": step, **figures, "tokens": step * self.tokens_per_step}
        record["tokens_per_second"] = round(rate, 1)
        if self.peak_flops:
            record["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
        record["memory_gib"] = round(memory_bytes / GIB, 3)
        self._write(record)
        seconds_left = self._seconds_left(step, now, self.tokens_per_step / rate)
        if self.live is not None:
            self.live.step(record, duration(seconds_left))
        if step % self.log_every == 0 or step in (1, self.last_step):
            if self.live is None:
                log_line(f"Step {step}: {_in_words(record)}, eta={duration(seconds_left)}")
            self.restart_rate()

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        self._write({"step": step, "val_loss": loss})
        log_line(
            f"Validation at step {step}: loss={loss:.4f}, perplexity={math.exp(min(loss, 50)):.2f}"
        )
        self.restart_rate()

    def restart_rate(self) -> None:
        """Tokens per second are of the steps from now on; call it after what is no step."""
        self.since, self.steps_since = time.perf_counter(), 0

    def flush(self) -> None:
        """Before a save: what is recorded must outlive this process, as the checkpoint does."""
        for logger in self.loggers:
            logger.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.live is not None:
            self.live.close()
        for logger in self.loggers:
            logger.close(failed=error is not None)

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
