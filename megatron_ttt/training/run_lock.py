"""One run at a time in a run folder: two would overwrite and prune each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ttt.errors import EXIT_STOPPED, UserError, of_rank_0
from megatron_ttt.training.loggers import say
from megatron_ttt.training.stopping import StopRequests

LOCK_FILE = "lock"
POLL_SECONDS = 0.5
_HELD = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = "an unknown machine", "a process"


class StoppedWaiting(UserError):
    """A run that was to stop before it had begun."""

    exit_code = EXIT_STOPPED


@contextlib.contextmanager
def alone_in(run_dir: Path, patience_seconds: float, stop: StopRequests) -> Iterator[None]:
    """Hold the run folder, which is made if need be. Collective: rank 0 does, the others wait.

    A run that holds it may be one whose launcher was killed and that is still saving, so it gets
    `patience_seconds` to end. After that, `UserError` if it is on this machine. The lock of another
    machine may outlive that machine, and no restart should need a person: that one is warned of.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                lock = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(f"cannot write to run.dir={run_dir}: {error.strerror}") from None
            stack.callback(os.close, lock)
            _acquire(lock, run_dir, patience_seconds, stop)

        of_rank_0(hold)
        yield


def _acquire(lock: int, run_dir: Path, patience_seconds: float, stop: StopRequests) -> None:
    # A lock of POSIX: it goes with its process, and forked writers do not share it.
    end, waiting = time.monotonic() + patience_seconds, False
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _HELD:
                say(
                    f"Warning: run.dir={run_dir} cannot be locked ({error.strerror}): a second run "
                    "in it would not be noticed"
                )
                return
        host, process = _holder(lock)
        if not waiting:
            say(f"Waiting for {process} on {host}, which is training in {run_dir}")
        waiting = True
        if stop.heard_here():
            raise StoppedWaiting(f"stopped while {process} on {host} was training in {run_dir}")
        if time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        elif host in (socket.gethostname(), _UNKNOWN[0]):
            raise UserError(
                f"{process} on {host} is training in run.dir={run_dir}: stop it, or set another "
                "run.dir"
            )
        else:
            say(f"Warning: {run_dir} is locked from {host} still; going on as if that were lost")
            return
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        name = json.dumps([socket.gethostname(), f"process {os.getpid()}"]).encode()
        os.pwrite(lock, name, 0)
        os.ftruncate(lock, len(name))


def _holder(lock: int) -> tuple[str, str]:
    """Host and process that hold the lock, as far as they have said so."""
    try:
        host, process = json.loads(os.pread(lock, 1000, 0))
    except (ValueError, TypeError):
        return _UNKNOWN
    return str(host), str(process)
