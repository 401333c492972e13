"""Arrays that take long to build, kept in a folder from run to run.

An entry is `KEY-NAME.npy` for each of its arrays and `KEY.json`, which is written last and holds
their checksums. What is cut short, or has changed since, is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttt.data.atomic_file import own_suffix, remove_partials
from megatron_ttt.data.merge import file_sha256
from megatron_ttt.errors import UserError

_VERSION = 1
"""Raised when the same description comes to stand for other arrays."""


@contextlib.contextmanager
def open_cache(folder: Path) -> Iterator[None]:
    """Make the folder of a cache and be alone in it: no other run writes to it, or reads what is
    half written. Raises `UserError` where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the index cache {folder}: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        # A cache that cannot be written to is read as it is.
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(folder / "lock", "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another run that is at work in {folder}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            remove_partials(folder)  # of a run that was killed
        yield


def cached_entry(
    folder: Path, description: dict[str, Any], build: Callable[[], dict[str, np.ndarray]]
) -> Path:
    """The entry of what is described, which is built where it is missing or damaged.

    Call it within `open_cache`. description: all that decides what `build` returns. Raises
    `UserError` where the entry cannot be written.
    """
    content = json.dumps({"version": _VERSION, **description}, sort_keys=True)
    entry = folder / hashlib.sha256(content.encode()).hexdigest()[:32]
    if _is_whole(entry):
        return entry
    arrays = build()
    try:
        for name, array in arrays.items():
            _write(_array_path(entry, name), lambda path, array=array: _save(path, array))
        record = {
            "description": json.loads(content),
            "sha256": {name: file_sha256(_array_path(entry, name)) for name in arrays},
        }
        text = json.dumps(record, indent=1) + "\n"
        _write(_record_path(entry), lambda path: path.write_text(text))
    except OSError as error:
        raise UserError(f"cannot write the index cache {folder}: {error.strerror}") from error
    return entry


def has_entry(entry: Path) -> bool:
    """Whether an entry that was written is seen from here."""
    return _record_path(entry).exists()


def load_arrays(entry: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a whole entry, mapped. Raises `UserError` where they are not there."""
    try:
        return [np.load(_array_path(entry, name), mmap_mode="r") for name in names]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read the index cache {entry.parent}, which has just been written: name "
            f"another folder in data.cache_dir ({error})"
        ) from error


def _array_path(entry: Path, name: str) -> Path:
    return entry.with_name(f"{entry.name}-{name}.npy")


def _record_path(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.json")


def _is_whole(entry: Path) -> bool:
    try:
        sums = json.loads(_record_path(entry).read_bytes())["sha256"]
        whole = [file_sha256(_array_path(entry, name)) == sums[name] for name in sums]
        return bool(whole) and all(whole)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a file appear under its name when it is whole: another run may map the old one."""
    partial = path.with_name(path.name + own_suffix())
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
