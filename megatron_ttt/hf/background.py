"""Exports beside a training run: one after the other, in a process of its own, on the CPU."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Export:
    output: Path
    unpublished: Path
    log: Path
    process: subprocess.Popen


class BackgroundExports:
    """What one rank of a run exports; call `advance` now and then."""

    def __init__(self):
        self._waiting: deque[tuple[Path, Path]] = deque()
        self._running: _Export | None = None

    def add(self, checkpoint: Path, output: Path) -> None:
        """Export this too; `output` takes the place of what has that name once it is verified."""
        self._waiting.append((checkpoint, output))

    def advance(self) -> list[str]:
        """Give an export that has ended its name, and begin the next; a line about it, good or
        bad."""
        lines = []
        if self._running is not None and self._running.process.poll() is not None:
            ended, self._running = self._running, None
            lines.append(_publish(ended))
        if self._running is None and self._waiting:
            self._running = _begin(*self._waiting.popleft())
        return lines

    def abandon(self) -> None:
        """Leave undone what is not done."""
        self._waiting.clear()
        if self._running is not None:
            self._running.process.terminate()

    @property
    def busy(self) -> bool:
        """Whether one is running or waits."""
        return self._running is not None or bool(self._waiting)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed run was exporting. Its exporter may still be at it: it then fails."""
    for pattern in (".exported-*", ".unverified-.exported-*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _begin(checkpoint: Path, output: Path) -> _Export:
    unpublished = output.parent / f".exported-{output.name}.{secrets.token_hex(4)}"
    log = output.parent / f".export-{output.name}.log"
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER and not key.startswith("TORCHELASTIC")
    }
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", __package__ + ".exporter", checkpoint, unpublished],
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a launcher signals the process group
        )
    return _Export(output, unpublished, log, process)


def _publish(export: _Export) -> str:
    if export.process.returncode:
        reason = (export.log.read_text().strip().splitlines() or ["no output"])[-1]
        return f"NOT exported: {export.output}: {reason} (all of it: {export.log})"
    shutil.rmtree(export.output, ignore_errors=True)
    os.rename(export.unpublished, export.output)
    warnings = [line for line in export.log.read_text().splitlines() if line.startswith("Warning:")]
    export.log.unlink()
    return "\n".join([f"Exported {export.output}", *warnings])
