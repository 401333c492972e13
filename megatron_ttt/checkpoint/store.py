"""The run folder: `checkpoint-STEP/` and `milestone-STEP/`, what is in them, which is the newest.

A checkpoint folder holds megatron-core's distributed checkpoint and `state.json`: the step, the
architecture, the layout it was written at, the whole configuration. It is written under a temporary
name and renamed when complete, so a folder of that name is a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ttt.errors import UserError

STATE_FILE = "state.json"
_NAME = re.compile(r"(checkpoint|milestone)-(\d+)$")

ARCHITECTURE = (
    "layer",
    "backbone",
    "num_layers",
    "hidden_size",
    "num_heads",
    "ffn_hidden_size",
    "vocab_size",
    "mini_batch_size",
    "conv_kernel",
)
"""Fields of the model section that a checkpoint and its reader must agree on."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and what its state.json says."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return self.state["step"]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration it was trained with, as a tree of dicts."""
        return self.state["config"]


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"checkpoint-{step}"


def milestone_name(step: int) -> str:
    """Folder of the milestone after `step` steps."""
    return f"milestone-{step}"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder's state. Raises UserError where there is no complete checkpoint."""
    path = Path(path)
    try:
        return Checkpoint(path, json.loads((path / STATE_FILE).read_text()))
    except OSError as error:
        raise UserError(
            f"no checkpoint at {path} ({STATE_FILE}: {error.strerror}): name a checkpoint-STEP "
            "folder"
        ) from None
    except ValueError:
        raise UserError(f"{path / STATE_FILE} is damaged: use another checkpoint") from None


def find_newest(run_dir: str | Path) -> Checkpoint | None:
    """The checkpoint or milestone of the highest step in a run folder; None if there is none."""
    found = [(step, path) for kind, step, path in _listing(Path(run_dir))]
    return open_checkpoint(max(found)[1]) if found else None


def _listing(run_dir: Path) -> list[tuple[str, int, Path]]:
    if not run_dir.is_dir():
        return []
    matches = [(_NAME.match(path.name), path) for path in run_dir.iterdir()]
    return [(m[1], int(m[2]), path) for m, path in matches if m and (path / STATE_FILE).exists()]


def check_architecture(checkpoint: Checkpoint, model: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not this model's."""
    saved = checkpoint.config["model"]
    ignored = (
        () if model["layer"].startswith("ttt") else ("backbone", "mini_batch_size", "conv_kernel")
    )
    differing = [
        f"{key}={saved[key]} there, {model[key]} here"
        for key in ARCHITECTURE
        if saved[key] != model[key] and key not in ignored
    ]
    if differing:
        raise UserError(
            f"{checkpoint.path} is of another architecture: model.{'; model.'.join(differing)}"
        )


def temporary_path(path: Path) -> Path:
    """Where a folder is written before it is complete."""
    return path.parent / f".incomplete-{path.name}"


def publish(path: Path, state: dict[str, Any]) -> None:
    """Complete the temporary folder of `path` with its state and give it its name.

    A folder that has the name already is what an earlier attempt at the same step left, before the
    run was taken up again from further back; it goes.
    """
    temporary = temporary_path(path)
    with open(temporary / STATE_FILE, "w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        _remove(path)
    os.rename(temporary, path)


def link_milestone(checkpoint: Path, step: int) -> None:
    """Give a published checkpoint a second, lasting name, without a second copy of its files."""
    milestone = checkpoint.parent / milestone_name(step)
    if milestone.exists():
        return
    temporary = temporary_path(milestone)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint, temporary, copy_function=os.link)
    os.rename(temporary, milestone)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints; 0 keeps all. Milestones stay."""
    checkpoints = sorted(
        (step, path) for kind, step, path in _listing(run_dir) if kind == "checkpoint"
    )
    for _, path in checkpoints[:-keep] if keep else []:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, under another name: cut short, no half of it is left behind."""
    doomed = path.parent / f".removed-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
