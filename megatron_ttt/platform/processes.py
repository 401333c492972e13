"""Other processes of this machine."""

from __future__ import annotations

import psutil


def is_running(process: psutil.Process) -> bool:
    """Whether a process still runs: one that was killed and not yet waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
