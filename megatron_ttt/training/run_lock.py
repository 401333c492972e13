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
from typing import IO

import torch.distributed as dist

from megatron_ttt.errors import UserError
from megatron_ttt.training.loggers import say

LOCK_FILE = "lock"
POLL_SECONDS = 0.5
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def alone_in(run_dir: Path, patience_seconds: float) -> Iterator[None]:
    """On rank 0: hold the run folder, which is made if need be; on the others nothing.

    A run that holds it may be one whose launcher was killed and that is still saving, so it gets
    `patience_seconds` to end. After that, `UserError` if it is on this machine. The lock of another
    machine may outlive that machine, and no restart should need a person: that one is warned of.
    """
    if dist.get_rank() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(run_dir / LOCK_FILE, "a+"))
        except OSError as error:
            raise UserError(f"cannot write to run.dir={run_dir}: {error.strerror}") from None
        _acquire(file, run_dir, patience_seconds)
        yield


def _acquire(file: IO[str], run_dir: Path, patience_seconds: float) -> None:
    # A lock of POSIX: it goes with its process, and forked writers do not share it.
    end, waiting = time.monotonic() + patience_seconds, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _HELD:
                say(
                    f"Warning: run.dir={run_dir} cannot be locked ({error.strerror}): a second run "
                    "in it would not be noticed"
                )
                return
        host, process = _holder(file)
        if not waiting:
            say(f"Waiting for process {process} on {host}, which is at work in {run_dir}")
        waiting = True
        if time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        elif host == socket.gethostname():
            raise UserError(
                f"process {process} is training in run.dir={run_dir}: stop it, or set another "
                "run.dir"
            )
        else:
            say(f"Warning: {run_dir} is locked from {host} still; going on as if that were lost")
            return
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        file.truncate(0)
        file.write(json.dumps([socket.gethostname(), os.getpid()]))
        file.flush()


def _holder(file: IO[str]) -> tuple[str, int]:
    """Host and process that hold the lock, as far as they have said so."""
    file.seek(0)
    try:
        host, process = json.loads(file.read())
    except ValueError:
        return "another machine", 0
    return host, process
