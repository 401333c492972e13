"""The run folder: `checkpoint-STEP/` and `milestone-STEP/`, what is in them, which is the newest.

A checkpoint folder holds megatron-core's distributed checkpoint, `state.json` (the step, the
architecture, the layout it was written at, the whole configuration, the validation loss) and
`manifest.json` (sizes and checksums). It is written under a temporary name and renamed when all of
it is on the disk, so a folder of that name was a whole checkpoint; its manifest tells whether it
still is. `latest` names the newest, for people and scripts; the trainer looks for itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ttt.checkpoint.manifest import (
    MANIFEST_FILE,
    find_damage,
    folder_files,
    fsync_directory,
    replace_durably,
    write_manifest,
)
from megatron_ttt.config import config_with_defaults, flatten_tree
from megatron_ttt.config.former_keys import in_current_keys
from megatron_ttt.errors import UserError
from megatron_ttt.stack import Architecture, architecture_of

STATE_FILE = "state.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"(checkpoint|milestone)-(\d+)$")


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
        """The configuration it was trained with, as a tree of dicts with the keys of today."""
        return in_current_keys(self.state["config"], None)


class Listed(NamedTuple):
    """A folder that has the name of a checkpoint; they sort by step."""

    step: int
    kind: str  # "checkpoint" or "milestone"
    path: Path


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
        state = json.loads((path / STATE_FILE).read_text())
        if isinstance(state, dict) and {"step", "config", "has_optimizer"} <= state.keys():
            return Checkpoint(path, state)
    except OSError as error:
        raise UserError(
            f"no checkpoint at {path} ({STATE_FILE}: {error.strerror}): name a checkpoint-STEP "
            "folder"
        ) from None
    except ValueError:
        pass
    raise UserError(f"{path / STATE_FILE} is damaged: use another checkpoint")


def open_whole_checkpoint(
    path: str | Path, damage_of: Callable[[Path], str | None] = find_damage
) -> Checkpoint:
    """As `open_checkpoint`; UserError too where it is no longer what was written."""
    checkpoint = open_checkpoint(path)
    if damage := damage_of(checkpoint.path):
        raise UserError(f"{path} is damaged ({damage}): use another checkpoint")
    return checkpoint


def find_newest(
    listed: list[Listed],
    log_line: Callable[[str], None] = print,
    damage_of: Callable[[Path], str | None] = find_damage,
) -> Checkpoint | None:
    """The newest checkpoint or milestone of a run folder that is still what was written.

    listed: of `list_checkpoints`. Those that are not are skipped, and `log_line` is told which and
    why. None if there is none to go on from; UserError if there are only damaged ones, as starting
    anew would then lose the run.
    """
    damaged = {}
    for one in sorted(listed, reverse=True):
        damage = damage_of(one.path)
        if damage is None:
            return open_checkpoint(one.path)
        damaged[one.path] = damage
        log_line(f"Skipped {one.path}: {damage}")
    if damaged:
        path, damage = next(iter(damaged.items()))
        raise UserError(
            f"every checkpoint in {path.parent} is damaged ({path.name}: {damage}): restore one, "
            "or set another run.dir to start anew"
        )
    return None


def list_checkpoints(run_dir: str | Path) -> list[Listed]:
    """Every checkpoint and milestone folder of a run, unverified, the oldest first."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    matches = [(_NAME.match(path.name), path) for path in run_dir.iterdir()]
    return sorted(Listed(int(m[2]), m[1], path) for m, path in matches if m)


def check_architecture(
    checkpoint: Checkpoint,
    architecture: Architecture,
    log_line: Callable[[str], None] = print,
) -> None:
    """Refuse a checkpoint whose tensors are not this model's; warn of what else differs."""
    tree = {key: checkpoint.config[key] for key in ("model", "mixers") if key in checkpoint.config}
    saved = architecture_of(config_with_defaults(tree, checkpoint.path))
    theirs, ours = saved.parameters(), architecture.parameters()
    fits = theirs.keys() == ours.keys() and all(
        row.has_layout_of(theirs[name]) for name, row in ours.items()
    )
    there, here = flatten_tree(saved.to_tree()), flatten_tree(architecture.to_tree())
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if not fits:
        listed = "; ".join(f"{k}={there.get(k)} there, {here.get(k)} here" for k in differing)
        raise UserError(f"{checkpoint.path} is of another architecture: {listed}")
    for key in differing:
        if key not in _INITIAL:
            log_line(
                f"Warning: {checkpoint.path} was trained with {key}={there.get(key)}, not "
                f"{here.get(key)}"
            )


_INITIAL = ("model.init_std", "model.mixer_modules")
"""Keys that make no other model of trained weights."""


def temporary_path(path: Path, token: str) -> Path:
    """Where a folder is written before it is complete; another token, another folder."""
    return path.parent / f".incomplete-{path.name}.{token}"


def publish(temporary: Path, path: Path, described: dict[str, dict[str, int | str]]) -> None:
    """Give a temporary folder its name, `path`, with the manifest of its files.

    described: every file in it, as `manifest.describe` saw it. A folder that has the name already
    is what an earlier attempt at the same step left, before the run was taken up again from further
    back; it goes.
    """
    write_manifest(temporary, described)
    if os.path.lexists(path):
        _remove(path)
    os.rename(temporary, path)
    fsync_directory(path.parent)


def write_pointer(path: Path) -> None:
    """Let `latest` in the run folder name a checkpoint, replacing the file as a whole."""
    replace_durably(path.parent / LATEST_FILE, path.name + "\n")


def link_milestone(checkpoint: Path, step: int) -> None:
    """Give a published checkpoint a second, lasting name, without a second copy of its files where
    the file system has hard links."""
    milestone = checkpoint.parent / milestone_name(step)
    temporary = temporary_path(milestone, "link")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in (*folder_files(checkpoint), MANIFEST_FILE):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(checkpoint / name, temporary / name)
        if os.path.lexists(milestone):
            _remove(milestone)  # of an earlier attempt, as in `publish`
        os.rename(temporary, milestone)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_or_copy(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        with open(other, "rb") as copy:
            os.fsync(copy.fileno())


def quarantine(run_dir: Path, step: int) -> list[Path]:
    """Rename every checkpoint and milestone after `step` to abandoned-NAME, which nothing looks at.
    Returns the new names.

    Call it when a run goes on from `step`: were they still there, they would be its newest.
    """
    aside = []
    for listed in list_checkpoints(run_dir):
        if listed.step > step:
            path = run_dir / f"abandoned-{listed.path.name}"
            while path.exists():
                path = path.with_name(path.name + "+")
            os.rename(listed.path, path)
            aside.append(path)
    return aside


def prune(
    run_dir: Path, keep: int, remove_tree: Callable[[Path], None] = shutil.rmtree
) -> list[Path]:
    """Remove all checkpoints but the `keep` newest and the one of the best validation loss; 0 keeps
    all. Milestones stay. Returns what went.

    Call it when the newest has just been published: then a good one is always left. remove_tree: is
    given what is no checkpoint by name any more, to remove at its leisure; what it leaves, if the
    process is killed, `remove_leftovers` finds.
    """
    checkpoints = [
        listed.path for listed in list_checkpoints(run_dir) if listed.kind == "checkpoint"
    ]
    old = checkpoints[:-keep] if keep else []
    best = _best(checkpoints)
    doomed = [path for path in old if path != best]
    for path in doomed:
        _remove(path, remove_tree)
    return doomed


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a run that was killed in a save left under temporary names."""
    for pattern in (".incomplete-*", ".removed-*"):
        for path in run_dir.glob(pattern):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)


def _best(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss; None if none has one."""
    losses = {}
    for path in checkpoints:
        with contextlib.suppress(UserError):
            losses[path] = open_checkpoint(path).state.get("val_loss")
    known = [path for path, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return min(known, key=losses.get, default=None)


def _remove(path: Path, remove_tree: Callable[[Path], None] = shutil.rmtree) -> None:
    """Remove a checkpoint, under another name: cut short, no half of it is left behind. Of one that
    somebody has moved and put a link to in its place, the link alone."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.parent / f".removed-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    remove_tree(doomed)
