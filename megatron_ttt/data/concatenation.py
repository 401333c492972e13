"""The `.bin` of a dataset, put together from the parts of its shards.

The file is made in the run's folder, in its full length; threads copy a part each to its place and
sum it up as they do. A part that is in place and on the disk leaves a marker there, and its room:
the disk holds the dataset once, and the parts that are under way. A run that was killed goes on
from the markers.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_ttt.data.atomic_file import rename_durably
from megatron_ttt.data.build_folder import VERSION, copied_path, load_copied, publish_json
from megatron_ttt.data.indexed import bin_path

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """The `.bin` of a shard: its prefix, and what its manifest says of it."""

    prefix: Path
    size: int
    sha256: str


class Concatenation:
    """The `.bin` at `path`, in the making in `folder`."""

    def __init__(self, path: Path, folder: Path, parts: Sequence[Part]) -> None:
        self._path, self._file = path, folder / path.name
        self._parts = parts
        *self._offsets, self._total = accumulate((part.size for part in parts), initial=0)

    def copy(self, threads: int) -> list[Part]:
        """Bring the parts to their places; those that are not what their manifests say."""
        if not self._file.exists() and self._has_its_name():
            self._file = self._path
        target = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        pool = ThreadPoolExecutor(threads)
        try:
            os.ftruncate(target, self._total)
            sound = pool.map(lambda *part: self._place(target, *part), self._parts, self._offsets)
            return [part for part, is_sound in zip(self._parts, sound) if not is_sound]
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(target)

    def _has_its_name(self) -> bool:
        """Whether a run got as far as `publish` before it was killed."""
        copied = not any(bin_path(part.prefix).exists() for part in self._parts)
        return copied and self._path.exists() and self._path.stat().st_size == self._total

    def _place(self, target: int, part: Part, offset: int) -> bool:
        """Copy a part, or look at the one in place; whether it is sound."""
        place = {"output": self._path.name, "offset": offset, "total": self._total}
        try:
            with open(bin_path(part.prefix), "rb") as source:

                def copied(at: int) -> bytes:
                    content = source.read(_COPY_BYTES)
                    _write_all(target, content, offset + at)
                    return content

                if _checksum(copied) != (part.size, part.sha256):
                    return False
        except FileNotFoundError:
            if load_copied(part.prefix) != place:
                return False

            def in_place(at: int) -> bytes:
                return os.pread(target, min(_COPY_BYTES, part.size - at), offset + at)

            return _checksum(in_place) == (part.size, part.sha256)
        os.fsync(target)
        publish_json(copied_path(part.prefix), {"version": VERSION, **place})
        bin_path(part.prefix).unlink()
        return True

    def publish(self) -> None:
        """Give the file its name."""
        if self._file != self._path:
            rename_durably(self._file, self._path)


def _checksum(read: Callable[[int], bytes]) -> tuple[int, str]:
    """The length and the SHA-256 of what is read, piece by piece, until there is no more."""
    size, digest = 0, hashlib.sha256()
    while content := read(size):
        digest.update(content)
        size += len(content)
    return size, digest.hexdigest()


def _write_all(target: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(target, rest, offset)
        rest, offset = rest[written:], offset + written


def differing_part(path: Path, parts: Sequence[dict], threads: int) -> dict | None:
    """The first of a `.bin`'s parts, as its manifest names them, whose content is another."""

    def is_sound(part: dict, offset: int) -> bool:
        with open(path, "rb") as file:
            file.seek(offset)
            found = _checksum(lambda at: file.read(min(_COPY_BYTES, part["size"] - at)))
        return found == (part["size"], part["sha256"])

    offsets = accumulate((part["size"] for part in parts), initial=0)
    with ThreadPoolExecutor(threads) as pool:
        sound = list(pool.map(is_sound, parts, offsets))
    return next((part for part, is_so in zip(parts, sound) if not is_so), None)
