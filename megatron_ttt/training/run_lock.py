"""One run at a time in a run folder: two would overwrite and prune each other's checkpoints.

The run locks a file in the folder and touches it every BEAT_SECONDS. A lock of this machine goes
with its process. A lock of another machine may outlive it; what tells is whether the file is still
touched. Whoever takes such a lock over puts a new file in the place of the old one: the run before,
if it lives after all, finds that its own file is gone, and stops.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ttt.errors import EXIT_STOPPED, TrainingError, UserError, run_on_rank0
from megatron_ttt.training.loggers import log_line
from megatron_ttt.training.stopping import StopRequests

LOCK_FILE = "lock"
POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
MISSED_BEATS = 3
"""At least so many until a run on another machine counts as lost."""
_HELD = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = "an unknown machine", "a process"


class StoppedWaiting(UserError):
    """A run that was to stop before it had begun."""

    exit_code = EXIT_STOPPED


@contextlib.contextmanager
def exclusive_run_dir(run_dir: Path, patience_seconds: float, stop: StopRequests) -> Iterator[None]:
    """Hold the run folder, which is made if need be. Collective: rank 0 does, the others wait.

    A run that holds it may be one whose launcher was killed and that is still saving, so it gets
    `patience_seconds` to end. After that, `UserError` if it is on this machine, or on another and
    still touches its lock. No restart should need a person: one that does not is warned of, and its
    lock taken over. `stop` hears of it when that happens to the run that holds the folder.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            lock = RunLock(run_dir)
            stack.callback(lock.close)
            lock.acquire(patience_seconds, stop)
            lock.beat()
            stop.lock = lock

        run_on_rank0(hold)
        yield


class RunLock:
    """The lock of a run folder.

    lost: whether another run was seen to have taken it over.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.path, self.lost = run_dir, run_dir / LOCK_FILE, False
        self._file = self._open()
        self._ended, self._guard = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def acquire(self, patience_seconds: float, stop: StopRequests) -> None:
        """Lock the file, or take it over; see `exclusive_run_dir`."""
        start = last_beat = time.monotonic()
        touched = None
        while not (self._try_lock() and self._is_there()):
            now, (host, process) = time.monotonic(), _holder(self._file)
            before, touched = touched, os.fstat(self._file).st_mtime_ns
            if before is None:
                log_line(f"Waiting for {process} on {host}, which is training in {self.run_dir}")
            elif touched != before:
                last_beat = now
            if stop.heard_here():
                raise StoppedWaiting(
                    f"stopped while {process} on {host} was training in {self.run_dir}"
                )
            elsewhere = host not in (socket.gethostname(), _UNKNOWN[0])
            if elsewhere and now - last_beat >= max(patience_seconds, MISSED_BEATS * BEAT_SECONDS):
                log_line(
                    f"Warning: {self.run_dir} is locked from {host} still; going on as if that "
                    "were lost"
                )
                self._replace()
                return
            if now - start >= patience_seconds and (last_beat > start or not elsewhere):
                raise UserError(
                    f"{process} on {host} is training in run.dir={self.run_dir}: stop it, or set "
                    "another run.dir"
                )
            time.sleep(POLL_SECONDS)
            # A file server is asked for what is in a file, and when it changed, as it is opened.
            os.close(self._file)
            self._file = self._open()
        _sign(self._file)

    def beat(self) -> None:
        """Touch the file from now on, in a thread: long steps and saves are signs of life too."""

        def go_on() -> None:
            while not self._ended.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError, UserError):  # the next save says it better
                    self._hold_on()

        self._thread = threading.Thread(target=go_on, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise TrainingError where another run has taken the folder over."""
        with contextlib.suppress(OSError):
            self._hold_on()
        if self.lost:
            raise TrainingError(
                f"another run has taken over run.dir={self.run_dir}, as if this one were lost: it "
                "stops here and leaves the folder to that"
            )

    def close(self) -> None:
        """Let go of the folder."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._file)

    def _open(self, name: str = LOCK_FILE) -> int:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            return os.open(self.run_dir / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to run.dir={self.run_dir}: {error.strerror}") from None

    def _try_lock(self) -> bool:
        # A lock of POSIX: it goes with its process, and forked writers do not share it. It goes too
        # when any descriptor of the file is closed: nobody else may open it here.
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            log_line(
                f"Warning: run.dir={self.run_dir} cannot be locked ({error.strerror}): a second "
                "run in it would not be noticed"
            )
        return True

    def _is_there(self) -> bool:
        """Whether the file is the one in the folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _replace(self) -> None:
        """Put a new file, locked, in the place of the one there is."""
        name = f".{LOCK_FILE}.{secrets.token_hex(4)}"
        os.close(self._file)
        self._file = self._open(name)
        self._try_lock()
        _sign(self._file)
        os.replace(self.run_dir / name, self.path)

    def _hold_on(self) -> None:
        """Touch the file, or notice that it is another's. One that was removed is made anew."""
        with self._guard:
            if not self.lost and not self.path.exists():
                log_line(f"Warning: {self.path} was removed under the run; it is made anew")
                os.close(self._file)
                self._file = self._open()
                if self._try_lock():
                    _sign(self._file)
                else:
                    self.lost = True
            self.lost = self.lost or not self._is_there()
            if not self.lost:
                os.utime(self._file)


def _sign(file: int) -> None:
    """Say in the file who holds it."""
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        name = json.dumps([socket.gethostname(), f"process {os.getpid()}"]).encode()
        os.pwrite(file, name, 0)
        os.ftruncate(file, len(name))


def _holder(file: int) -> tuple[str, str]:
    """Host and process that hold the lock, as far as they have said so."""
    try:
        host, process = json.loads(os.pread(file, 1000, 0))
    except (ValueError, TypeError):
        return _UNKNOWN
    return str(host), str(process)
