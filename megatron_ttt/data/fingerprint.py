"""Whether the data of a run is still what it began with.

A file's fingerprint is its size and the SHA-256 of its content; of a file above 64 MiB, of 64
blocks of 1 MiB at even distances, from its first byte to its last: seconds, however big it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_ttt.errors import UserError

Fingerprint = dict[str, int | str]

_BLOCK, _BLOCKS = 1 << 20, 64


def fingerprint(path: Path) -> Fingerprint:
    """Size and checksum of a file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for index in range(_BLOCKS):
            if size > _BLOCK * _BLOCKS:
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return {"bytes": size, "sha256": digest.hexdigest()}


def fingerprints(paths: Iterable[Path]) -> dict[str, Fingerprint]:
    """The fingerprint of each file there is, by path."""
    return {str(path): fingerprint(path) for path in paths if path.is_file()}


def check_unchanged(begun: dict[str, Fingerprint], here: dict[str, Fingerprint]) -> None:
    """Refuse a file that is not what the run began with. Files under new names are not compared."""
    for path, seen in here.items():
        expected = begun.get(path, seen)
        if seen != expected:
            what = "content"
            if seen["bytes"] != expected["bytes"]:
                what = f"size ({seen['bytes']} bytes, not {expected['bytes']})"
            raise UserError(
                f"{path} has changed since this run began, in its {what}: bring back what it was, "
                "or set another run.dir to start anew"
            )
