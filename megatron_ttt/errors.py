"""How a user's mistake leaves the program: one line on stderr, exit code 2."""

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; a `UserError` becomes one line and exit code 2.

    Under torchrun every rank meets the same mistake, and only rank 0 prints it.
    """
    try:
        return main() or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
