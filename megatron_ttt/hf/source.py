"""Which checkpoint a directory was exported from, as it says itself."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ttt.checkpoint.manifest import MANIFEST_FILE, describe

SOURCE_FILE = "exported_from.json"


def write_source(directory: Path, checkpoint: Path) -> None:
    """Note the checkpoint in a directory made of it."""
    (directory / SOURCE_FILE).write_text(json.dumps(_source(checkpoint), indent=1) + "\n")


def is_export_of(directory: Path, checkpoint: Path) -> bool:
    """Whether the directory was made of this very checkpoint, or of a hard link or copy of it."""
    try:
        noted = json.loads((directory / SOURCE_FILE).read_text())
        return noted["manifest_sha256"] == _source(checkpoint)["manifest_sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _source(checkpoint: Path) -> dict[str, str]:
    """A manifest holds the checksums of all else, so that its own stands for the checkpoint."""
    manifest = describe(checkpoint / MANIFEST_FILE)
    return {"checkpoint": checkpoint.resolve().name, "manifest_sha256": manifest["sha256"]}
