"""Which checkpoint a directory was exported from, and how it is evaluated, as it says itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ttt.checkpoint.manifest import MANIFEST_FILE
from megatron_ttt.checkpoint.run_folder import Checkpoint

SOURCE_FILE = "exported_from.json"

_EVALUATION = {
    "run": ("seed",),
    "training": ("seq_length", "micro_batch_size", "global_batch_size", "eval_batches"),
    "data": ("mask_bos",),
}
"""What decides which sequences an evaluation reads, beside the data, and which targets count."""


def write_source(directory: Path, checkpoint: Checkpoint) -> None:
    """Note the checkpoint in a directory made of it."""
    noted = {**_source(checkpoint.path), "evaluation": _evaluation_of(checkpoint.config)}
    (directory / SOURCE_FILE).write_text(json.dumps(noted, indent=1) + "\n")


def read_evaluation(directory: Path) -> dict[str, Any]:
    """How the checkpoint a directory was made of is evaluated, as a configuration's tree; empty
    where the directory does not say."""
    try:
        return _evaluation_of(json.loads((directory / SOURCE_FILE).read_text())["evaluation"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def is_export_of(directory: Path, checkpoint: Path) -> bool:
    """Whether the directory was made of this very checkpoint, or of a hard link or copy of it."""
    try:
        noted = json.loads((directory / SOURCE_FILE).read_text())
        return noted["manifest_sha256"] == _source(checkpoint)["manifest_sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _evaluation_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration's tree that an evaluation depends on."""
    return {
        section: {key: config[section][key] for key in keys if key in config[section]}
        for section, keys in _EVALUATION.items()
        if section in config
    }


def _source(checkpoint: Path) -> dict[str, str]:
    """A manifest holds the checksums of all else, so that its own stands for the checkpoint."""
    manifest = (checkpoint / MANIFEST_FILE).read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()
    return {"checkpoint": checkpoint.resolve().name, "manifest_sha256": digest}
