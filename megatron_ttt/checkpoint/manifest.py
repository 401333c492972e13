"""The sizes and checksums of a folder's files: whether it is still what was written.

`manifest.json` lies in the folder it describes, is written last, when the others are on the disk.
The checksums are XXH3's of 128 bits: they find damage at the speed of a disk, and prove nothing of
who wrote a file. Those of older manifests are SHA-256's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import xxhash

MANIFEST_FILE = "manifest.json"
_CHUNK = 1 << 22
_CHECKSUMS = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""The first is written."""


def folder_files(folder: Path) -> list[str]:
    """The files under `folder`, sorted, relative, without the manifest."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if str(path) != MANIFEST_FILE)


def describe(
    path: Path, *, durably: bool = False, checksum: str = next(iter(_CHECKSUMS))
) -> dict[str, int | str]:
    """Size and checksum of a file; durably: after bringing its content to the disk."""
    digest = _CHECKSUMS[checksum]()
    with open(path, "rb") as file:
        if durably:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, checksum: digest.hexdigest()}


def write_manifest(folder: Path, described: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest of files that `describe` has seen, and bring all to the disk."""
    write_durably(folder / MANIFEST_FILE, _text(described))
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync_directory(directory)


def find_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a folder, in a few words; None if it is what its manifest says.

    share: which of so many `shares` of the files is read; who has them all knows all.
    """
    try:
        text = (folder / MANIFEST_FILE).read_text()
        described = json.loads(text)
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}: it was not completed"
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    # A change that leaves it JSON of the same meaning is damage too.
    if text != _text(described) or not _describes_files(described):
        return f"{MANIFEST_FILE} is damaged"
    for name in described:
        if not (folder / name).is_file():
            return f"{name} is missing"
    if extra := set(folder_files(folder)) - set(described):
        return f"{min(extra)} does not belong to it"
    largest_first = sorted(described, key=lambda name: (-described[name]["bytes"], name))
    for name in largest_first[share::shares]:
        path, expected = folder / name, described[name]
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            found = describe(path, checksum=next(iter(expected.keys() - {"bytes"})))
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} has another checksum"
    return None


def _describes_files(described) -> bool:
    return isinstance(described, dict) and all(
        isinstance(file, dict)
        and isinstance(file.get("bytes"), int)
        and file.keys() - {"bytes"} in ({name} for name in _CHECKSUMS)
        for file in described.values()
    )


def write_durably(path: Path, text: str) -> None:
    """Write a small file and bring its content to the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """As `write_durably`, but the file is the one before until it is whole."""
    new = path.with_name(f".{path.name}.new")
    write_durably(new, text)
    os.replace(new, path)
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(described: dict[str, dict[str, int | str]]) -> str:
    return json.dumps(described, indent=1, sort_keys=True) + "\n"
