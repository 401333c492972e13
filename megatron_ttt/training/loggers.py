"""Where the records of a run go: metrics.jsonl, Weights & Biases, TensorBoard.

A record is a dict of a `step` and figures, which have the same names everywhere. A resumed run goes
on from a checkpoint's step: what an earlier attempt wrote of later steps is dropped (where W&B
does not keep it), and what it wrote up to there is on the disk, as `flush` comes before every save.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_ttt.config import Config, to_dict
from megatron_ttt.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def log_line(message: str) -> None:
    """Print a line of the training log; where that is a file on a full disk, do without."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stdout, flush=True)


def log_on_rank0(message: str) -> None:
    """Print a line of the training log on rank 0 alone."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        log_line(message)


class Logger(Protocol):
    """One place that records go to."""

    def write(self, record: dict[str, Any]) -> None:
        """Take a record."""

    def flush(self) -> None:
        """Bring what was written to where it survives this process."""

    def close(self, failed: bool) -> None:
        """Flush, and say how the run ended where that is kept."""


def check_loggers(config: Config) -> None:
    """Raises UserError where a package that the configuration asks for is missing."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard=true needs the package tensorboard: "
            "pip install 'megatron-ttt[tensorboard]'"
        )


def open_loggers(config: Config, first_step: int) -> list[Logger]:
    """All that the configuration asks for. first_step: the step the run goes on from."""
    run_dir = Path(config.run.dir)
    loggers: list[Logger] = [JsonLines(run_dir / METRICS_FILE, first_step)]
    if config.logging.wandb_mode != "disabled":
        loggers.append(WandB(config, run_dir))
    if config.logging.tensorboard:
        loggers.append(TensorBoard(run_dir / TENSORBOARD_FOLDER, first_step))
    return loggers


class JsonLines:
    """metrics.jsonl: one line a step and one a validation. On a full disk lines are kept in memory
    until there is room; a file that is removed under the run is made anew."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        # Cut, not written anew: a run killed in between would lose what it had.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self.file.truncate(_bytes_until(path, first_step))
        self.unwritten, self.disk_is_full = b"", False

    def write(self, record: dict[str, Any]) -> None:
        self.unwritten += json.dumps(record).encode() + b"\n"
        self._write_out()

    def flush(self) -> None:
        self._write_out()
        if not self.disk_is_full:
            with self._warning():  # a file server may only now say that it is full
                os.fsync(self.file.fileno())

    def close(self, failed: bool) -> None:
        self._write_out()
        if self.unwritten:
            log_line(
                f"Warning: the last {self.unwritten.count(10)} lines of {METRICS_FILE} are lost"
            )
        with self._warning():
            self.file.close()

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Go on where what was handed over cannot be brought to the disk."""
        try:
            yield
        except OSError as error:
            log_line(f"Warning: lines of {METRICS_FILE} may be lost: {error.strerror}")

    def _write_out(self) -> None:
        """Write what there is; on a full disk the rest stays for the next time."""
        try:
            self._make_anew_if_removed()
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not self.disk_is_full:
                log_line(f"Warning: {METRICS_FILE} cannot be written: {error.strerror}; it is kept")
        self.disk_is_full = bool(self.unwritten)

    def _make_anew_if_removed(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self.file.close()
        self.file = file
        log_line(f"Warning: {self.path} was removed under the run; it is made anew, from here on")


def _bytes_until(path: Path, step: int) -> int:
    """How far the lines of an earlier attempt go, up to and with `step`; they are in order. A line
    that is not a record stays where it is."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        later = False
        with contextlib.suppress(ValueError, KeyError, TypeError):
            later = json.loads(line)["step"] > step
        if later or not line.endswith(b"\n"):
            break
        length += len(line)
    return length


class WandB:
    """Weights & Biases, online or into a folder to be synchronised later. A resumed run has the
    same run id and gives it the repeated steps again, with their numbers."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        try:
            self.run = wandb.init(
                project=config.logging.wandb_project,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                mode=config.logging.wandb_mode,
                dir=str(run_dir),
                config=to_dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logging.wandb_mode={config.logging.wandb_mode}: {' '.join(str(error).split())}: "
                "`wandb login` on rank 0's node, or set offline"
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def flush(self) -> None:
        """Its own process has what was logged."""

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files, one an attempt; readers drop what the attempt's first event purges. On a full
    disk the rest of the attempt goes without: its writer cannot go on."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.new_writer = folder, SummaryWriter
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.has_failed = False

    def write(self, record: dict[str, Any]) -> None:
        if self.has_failed:
            return
        with self._while_there_is_room():
            if not self.folder.is_dir():
                log_line(f"Warning: {self.folder}/ was removed under the run; it is made anew")
                self.writer = self.new_writer(str(self.folder))
            for name, figure in record.items():
                if name != "step":
                    self.writer.add_scalar(name, figure, record["step"])

    def flush(self) -> None:
        if self.has_failed:
            return
        with self._while_there_is_room():
            self.writer.flush()

    def close(self, failed: bool) -> None:
        with self._while_there_is_room():
            self.writer.close()

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """Leave the rest undone where writing fails."""
        try:
            yield
        except OSError as error:
            if self.has_failed:
                return
            self.has_failed = True
            log_line(
                f"Warning: {TENSORBOARD_FOLDER}/ cannot be written: {error.strerror}; it ends here"
            )
