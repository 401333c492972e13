"""Files that appear under their name only when they are whole."""

import os
from pathlib import Path
from typing import BinaryIO

from megatron_ttt.errors import UserError


class PartialFile:
    """A file written as `NAME.PID.partial` beside its place and renamed into it by `publish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream: BinaryIO = open(self._partial, "wb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def flush(self) -> None:
        """Bring the content to the disk, still under the partial name."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()

    def publish(self) -> None:
        """Rename a flushed file into place, and bring the renaming to the disk."""
        os.replace(self._partial, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Remove what was written; nothing happens after `publish`."""
        self.stream.close()
        self._partial.unlink(missing_ok=True)


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raise `UserError` when one of the outputs is there already and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --output-prefix or give --overwrite")
