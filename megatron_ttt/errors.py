"""How a user's mistake leaves the program: one line on stderr, exit code 2."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

RANK_0_FIRST_SECONDS = 10


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
    torchrun ends the others; a rank that is still there later is alone with its mistake.
    """
    try:
        return main() or 0
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how torchrun ends it
            time.sleep(RANK_0_FIRST_SECONDS)
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


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
