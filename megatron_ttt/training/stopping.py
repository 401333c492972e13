"""Why a run should end before its last step: a signal on any rank, its time is up, or its launcher
is gone.

A stopped run saves and leaves with EXIT_STOPPED; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from megatron_ttt.errors import run_on_rank0
from megatron_ttt.platform.processes import is_running

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 2.0
"""A launcher may repeat to each process the signal that its whole group got: not a second one."""

LAUNCHER = "MEGATRON_TTT_LAUNCHER"
"""Environment variable: torchrun's process id, where it is not the parent."""
LAUNCHER_WAS_KILLED = "the launcher was killed"

STOP = "MEGATRON_TTT_STOP"
"""Environment variable: set where the launcher was told to stop before this process began."""

_TIME_IS_UP, _LAUNCHER_IS_GONE, _FOLDER_IS_LOST = 1000, 1001, 1002


class StopRequests:
    """Notes signals from its construction on; a second one leaves the process at once.

    lock: on rank 0, the run folder's `run_lock.RunLock`, once the run holds it.
    """

    def __init__(self) -> None:
        self.lock = None
        self.started = time.monotonic()
        self._signal, self._received = 0, 0.0
        if STOP in os.environ:
            self._signal, self._received = signal.SIGUSR1, self.started
        # torchrun gives each rank a session of its own: killed, it leaves them behind. It may have
        # started a script (examples/multi_node/worker.sh) that started this process.
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # 0: not of this container
        self._has_launcher = "TORCHELASTIC_RUN_ID" in os.environ and launcher > 0
        self._launcher = None
        if self._has_launcher:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._launcher = psutil.Process(launcher)
        for number in SIGNALS:
            if number != signal.SIGHUP or self._heeds_hangup():
                signal.signal(number, self._note)

    @staticmethod
    def _heeds_hangup() -> bool:
        """Whether SIGHUP says that the terminal was closed. Under nohup nobody cares, and
        examples/multi_node/torchrun.sh ends processes by it that are to leave at once."""
        return LAUNCHER not in os.environ and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signal and now - self._received > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._received = number, now

    def heard_here(self) -> int:
        """What this process alone knows of, as a code: a signal, or that its launcher is gone, or
        its run folder another run's."""
        if self.lock is not None and self.lock.lost:
            return _FOLDER_IS_LOST
        if self._has_launcher and not (self._launcher and is_running(self._launcher)):
            return _LAUNCHER_IS_GONE
        return self._signal

    def reason(self, device, exit_after_minutes: float | None = None) -> str | None:
        """Why all ranks should stop now, in words; None to go on. Collective. Raises TrainingError
        where another run has taken the run folder over."""
        import torch
        import torch.distributed as dist

        minutes = (time.monotonic() - self.started) / 60
        time_is_up = exit_after_minutes is not None and minutes >= exit_after_minutes
        code = self.heard_here() or (_TIME_IS_UP if time_is_up else 0)
        everyones = torch.full((), code, device=device)  # not copied from the host
        dist.all_reduce(everyones, dist.ReduceOp.MAX)
        code = int(everyones.item())
        if code == 0:
            return None
        if code == _FOLDER_IS_LOST:
            self.check_alone()
        if code == _LAUNCHER_IS_GONE:
            return LAUNCHER_WAS_KILLED
        if code == _TIME_IS_UP:
            return f"training.exit_after_minutes={exit_after_minutes:g} are over"
        return f"{signal.Signals(code).name} was received"

    def check_alone(self) -> None:
        """Raise TrainingError, on all ranks, where another run has taken the run folder over.
        Collective; call it before anything in the folder is changed."""
        run_on_rank0(lambda: self.lock and self.lock.check())
