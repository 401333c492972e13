"""Where a run's figures go: the terminal, metrics.jsonl, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from megatron_ttt.config import Config, to_dict

GIB = 2**30


class MetricsLog:
    """Rank 0's log of a run. metrics.jsonl holds one line a step and one a validation."""

    def __init__(
        self,
        config: Config,
        first_step: int,
        tokens_per_step: int,
        peak_flops: float | None,
        flops_per_token: float,
    ):
        """first_step: the step the run goes on from; later lines of an earlier attempt go."""
        self.config, self.tokens_per_step = config, tokens_per_step
        self.peak_flops, self.flops_per_token = peak_flops, flops_per_token
        run_dir = Path(config.run.dir)
        path = run_dir / "metrics.jsonl"
        # Cut, not written anew: a run killed in between would lose what it had.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self.file.truncate(_bytes_until(path, first_step))
        self.unwritten, self.disk_is_full = b"", False
        self.wandb = (
            _start_wandb(config, run_dir) if config.logging.wandb_mode != "disabled" else None
        )
        self.since, self.steps_since = time.perf_counter(), 0

    def step(self, step: int, figures: dict[str, float], memory_bytes: int) -> None:
        """Record a training step; print every `training.log_every` of them."""
        self.steps_since += 1
        print_it = step % self.config.training.log_every == 0 or step == 1
        now = time.perf_counter()
        rate = self.steps_since * self.tokens_per_step / (now - self.since)
        record = {"step": step, **figures, "tokens": step * self.tokens_per_step}
        record["tokens_per_second"] = round(rate, 1)
        if self.peak_flops:
            record["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
        record["memory_gib"] = round(memory_bytes / GIB, 3)
        self._write(record)
        if print_it:
            left = (self.config.training.exit_step or self.config.training.steps) - step
            self._print(record, seconds_left=left * self.tokens_per_step / rate)
            self.since, self.steps_since = time.perf_counter(), 0

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        self._write({"step": step, "val_loss": loss})
        say(f"Validation at step {step}: loss={loss:.4f}, perplexity={math.exp(min(loss, 50)):.2f}")
        self.since, self.steps_since = time.perf_counter(), 0

    def sync(self) -> None:
        """Bring what was recorded to the disk, so that no checkpoint knows of more steps."""
        self._flush()
        if not self.disk_is_full:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush everything."""
        self._flush()
        if self.unwritten:
            say(f"Warning: the last {self.unwritten.count(10)} lines of metrics.jsonl are lost")
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, record: dict[str, Any]) -> None:
        self.unwritten += json.dumps(record).encode() + b"\n"
        self._flush()
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def _flush(self) -> None:
        """Write what there is; on a full disk the rest stays for the next time."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not self.disk_is_full:
                say(f"Warning: metrics.jsonl cannot be written: {error.strerror}; it is kept")
        self.disk_is_full = bool(self.unwritten)

    def _print(self, record: dict[str, Any], seconds_left: float) -> None:
        fields = [
            f"loss={record['loss']:.4f}",
            f"lr={record['lr']:.2e}",
            f"grad_norm={record['grad_norm']:.3f}",
            f"tokens/s={record['tokens_per_second']:,.0f}",
        ]
        if "mfu" in record:
            fields.append(f"mfu={record['mfu']:.1%}")
        fields.append(f"memory={record['memory_gib']:.2f}GiB")
        fields.append(f"eta={_duration(seconds_left)}")
        say(f"Step {record['step']}: {', '.join(fields)}")


def say(message: str) -> None:
    """Print a line of the training log; where that is a file on a full disk, do without."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stdout, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _bytes_until(path: Path, step: int) -> int:
    """How far the lines of an earlier attempt go, up to and with `step`; they are in order."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            complete = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except ValueError:
            complete = False
        if not complete:
            break
        length += len(line)
    return length


def _start_wandb(config: Config, run_dir: Path):
    import wandb

    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text() if id_file.exists() else secrets.token_hex(4)
    id_file.write_text(run_id)
    return wandb.init(
        project=config.logging.wandb_project,
        name=run_dir.name,
        id=run_id,
        resume="allow",
        mode=config.logging.wandb_mode,
        dir=str(run_dir),
        config=to_dict(config),
    )
