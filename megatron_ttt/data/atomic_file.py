"""Files that appear under their name only when they are whole."""

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from megatron_ttt.errors import UserError


class PartialFile:
    """A file written as `NAME.HOST.PID.partial` beside its place and renamed into it by `publish`.

    `write` keeps the SHA-256 of what it wrote in `sha256`; writing to `stream` does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = hashlib.sha256()
        self._partial = path.with_name(path.name + own_suffix())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream: BinaryIO = open(self._partial, "wb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def write(self, content: bytes) -> None:
        """Append to the file and to its checksum."""
        self.stream.write(content)
        self.sha256.update(content)

    def flush(self) -> None:
        """Bring the content to the disk, still under the partial name."""
        if self.stream.closed:
            return
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()

    def publish(self) -> None:
        """Rename a flushed file into place, and bring the renaming to the disk."""
        rename_durably(self._partial, self.path)

    def discard(self) -> None:
        """Remove what was written; nothing happens after `publish`."""
        with suppress(OSError):  # a full disk once more, while the buffer is flushed
            self.stream.close()
        self._partial.unlink(missing_ok=True)


def rename_durably(path: Path, name: Path) -> None:
    """Give a file another name, and bring that to the disk."""
    os.replace(path, name)
    directory = os.open(name.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def publish_bytes(path: Path, content: bytes) -> None:
    """Write a small file that is whole or not there, whatever happens in between."""
    file = PartialFile(path)
    try:
        file.write(content)
        file.flush()
        file.publish()
    finally:
        file.discard()


def partial_suffix(process: int) -> str:
    """What a process of this machine adds to the name of a file that is not whole yet."""
    return f".{socket.gethostname()}.{process}.partial"


def own_suffix() -> str:
    """What this process adds."""
    return partial_suffix(os.getpid())


def remove_partials(folder: Path, prefix: str = "", suffix: str = ".partial") -> None:
    """Remove what a process left in a folder under names that begin and end so."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            path.unlink(missing_ok=True)


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raise `UserError` when one of the outputs is there already and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --output-prefix or give --overwrite")


def refuse_folder(output_prefix: str) -> None:
    """Raise `UserError` for a prefix without a name: its files would be named after the folder."""
    if os.path.basename(output_prefix) in ("", os.curdir, os.pardir):
        raise UserError(
            f"--output-prefix {output_prefix!r} names a folder; add the name that its files begin "
            "with, as in data/c4"
        )
