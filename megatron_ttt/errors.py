"""How a user's mistake leaves the program: one line on stderr, exit code 2."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
RANK_0_FIRST_SECONDS = 10


EXIT_STOPPED = 75
"""Exit code of a run that stopped early and saved (the shell's EX_TEMPFAIL: try again)."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""

    exit_code = 2


class TrainingError(UserError):
    """A run that cannot go on, by no fault of its command line."""

    exit_code = 3


class LostRankError(UserError):
    """Another process of the job died or hangs; the same command goes on."""

    exit_code = 1


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; a `UserError` becomes one line and its exit code.

    Under torchrun all ranks usually meet the same mistake. Rank 0 says it and leaves, whereupon
    torchrun ends the others (with the same exit code, which other nodes' launchers read); a rank
    that is still there later is alone with its mistake.
    """
    try:
        return main() or 0
    except UserError as error:
        rank, code = int(os.environ.get("RANK", "0")), error.exit_code
        if rank and code == EXIT_STOPPED:
            return code  # every rank's, and no mistake
        if rank:
            for number in (signal.SIGTERM, signal.SIGHUP):  # how torchrun ends it
                signal.signal(number, lambda *_: os._exit(code))
            time.sleep(RANK_0_FIRST_SECONDS)
        where = f" (rank {rank})" if rank else ""
        with contextlib.suppress(OSError):  # of a terminal that was closed
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return code


def run_on_rank0(find: Callable[[], T]) -> T:
    """What rank 0 finds, which it alone looks for. Collective. Its `UserError` all ranks raise: on
    another node they would only see it go, and their launcher would try again."""
    import torch.distributed as dist

    found = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except UserError as refusal:
            found = [refusal]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def run_on_every_rank(work: Callable[[], T]) -> T:
    """What each rank's own work returns. Collective. The `UserError` of one all ranks raise."""
    import torch.distributed as dist

    own, refusals = None, [None] * dist.get_world_size()
    try:
        own, refusal = work(), None
    except UserError as error:
        refusal = error
    dist.all_gather_object(refusals, refusal)
    if refusal := next(filter(None, refusals), None):
        raise refusal
    return own


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise `UserError` for a value that is none of the choices."""
    if value not in choices:
        raise UserError(f"{key}={value} is none of {', '.join(choices)}")


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise `UserError` for a number below the least, an infinite one, or NaN."""
    if value == math.inf:
        raise UserError(f"{key}={value} is too large: set a finite number")
    if not value >= least:  # NaN is not
        raise UserError(f"{key}={value} is too small: set {least} or more")


def refuse_missing_folders(*outputs: Path | None) -> None:
    """Raise `UserError` where a file could not be written, before the work that is to be in it."""
    for output in filter(None, outputs):
        if not output.absolute().parent.is_dir():
            raise UserError(f"{output} cannot be written: {output.parent} is no folder")
        if output.is_dir():
            raise UserError(f"{output} cannot be written: it is a folder")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there; `UserError` where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
