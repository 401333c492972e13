"""Exports beside a training run: one after the other, in a process of its own, on the CPU.

    python -m megatron_ttt.hf.background CHECKPOINT OUTPUT PARENT

is that process. It ends when the process PARENT has ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_ttt.mixers.registry import LOADED, VARIABLE
from megatron_ttt.platform.processes import is_running

END_SECONDS = 5.0
"""So long an export that is abandoned has to tidy up."""

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Export:
    output: Path
    unpublished: Path
    log: Path
    process: subprocess.Popen
    abandoned: bool = False


class BackgroundExports:
    """What one rank of a run exports; call `advance` now and then.

    failures: of each export that failed, its folder and why.
    """

    def __init__(self):
        self.failures: dict[Path, str] = {}
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
            lines.append(self._publish(ended))
        if self._running is None and self._waiting:
            checkpoint, output = self._waiting.popleft()
            try:
                self._running = _begin(checkpoint, output)
            except OSError as error:
                lines.append(self._failed(output, str(error)))
        return lines

    def abandon(self) -> None:
        """Leave undone what is not done: the one that runs is ended, which `advance` then says."""
        self._waiting.clear()
        if self._running is not None:
            self._running.abandoned, process = True, self._running.process
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _publish(self, export: _Export) -> str:
        try:
            log = export.log.read_text()
            if export.process.returncode:
                remove_unfinished(export.unpublished.parent)
                if export.abandoned:
                    export.log.unlink()
                    return f"NOT exported: {export.output}: the next run does it"
                why = _why(export.process.returncode, log)
                return self._failed(export.output, f"{why} (all of it: {export.log})")
            if export.output.is_symlink():
                export.output.unlink()
            shutil.rmtree(export.output, ignore_errors=True)
            os.rename(export.unpublished, export.output)
            export.log.unlink()
        except OSError as error:
            return self._failed(export.output, str(error))
        warnings = [line for line in log.splitlines() if line.startswith("Warning:")]
        return "\n".join([f"Exported {export.output}", *warnings])

    def _failed(self, output: Path, why: str) -> str:
        self.failures[output] = why
        return f"NOT exported: {output}: {why}"

    @property
    def busy(self) -> bool:
        """Whether one is running or waits."""
        return self._running is not None or bool(self._waiting)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what was being exported when its process, or the run with it, was killed."""
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
            _command(checkpoint, unpublished),
            env={**environment, "CUDA_VISIBLE_DEVICES": "", **_mixers()},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a launcher signals the process group
        )
    return _Export(output, unpublished, log, process)


def _mixers() -> dict[str, str]:
    """Return what lets another process import the modules of mixers that this one has."""
    if not LOADED:
        return {}
    return {VARIABLE: ",".join(LOADED), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _command(checkpoint: Path, output: Path) -> list[str | Path]:
    module = __package__ + ".background"
    return [sys.executable, "-m", module, checkpoint, output, str(os.getpid())]


def _why(code: int, log: str) -> str:
    """Why an exporter failed, in one line."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return (log.strip().splitlines() or ["no output"])[-1]


def _export(checkpoint: str, output: str, parent: str) -> int:
    """Export as the exporter's process; return its exit code."""
    try:
        run = psutil.Process(int(parent))
    except psutil.NoSuchProcess:
        raise SystemExit("the run that asked for this export has ended") from None

    def end_with_parent() -> None:
        while is_running(run):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_SECONDS)
        os._exit(1)

    # As an exception: what was begun is removed on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    threading.Thread(target=end_with_parent, daemon=True).start()
    from megatron_ttt.errors import run_command
    from megatron_ttt.hf.exporter import export_checkpoint

    return run_command(lambda: export_checkpoint(Path(checkpoint), Path(output)))


if __name__ == "__main__":
    raise SystemExit(_export(*sys.argv[1:]))
