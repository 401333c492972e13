"""Exports beside a training run: each in a process of its own, on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    """What one rank of a run has started."""

    def __init__(self):
        self._running: list[_Export] = []

    def start(self, checkpoint: Path, output: Path) -> None:
        """Begin to export; `output` takes the place of what has that name once it is verified."""
        unpublished = output.parent / f".exported-{output.name}"
        shutil.rmtree(unpublished, ignore_errors=True)
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
        self._running.append(_Export(output, unpublished, log, process))

    def finished(self) -> bool:
        """Whether none is running any more."""
        return all(export.process.poll() is not None for export in self._running)

    def publish(self) -> list[str]:
        """Once finished: give the exports their names; a line about each, good or bad."""
        lines = []
        for export in self._running:
            if export.process.wait():
                reason = (export.log.read_text().strip().splitlines() or ["no output"])[-1]
                lines.append(f"NOT exported: {export.output}: {reason} (all of it: {export.log})")
                continue
            shutil.rmtree(export.output, ignore_errors=True)
            os.rename(export.unpublished, export.output)
            export.log.unlink()
            lines.append(f"Exported {export.output}")
        self._running = []
        return lines
