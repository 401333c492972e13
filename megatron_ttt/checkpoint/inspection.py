"""What `tools/checkpoint.py` says of checkpoints; nothing here needs a model or a process group."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.run_folder import (
    Checkpoint,
    list_checkpoints,
    open_checkpoint,
    prune,
)
from megatron_ttt.config import flatten_tree
from megatron_ttt.errors import UserError


def listing(run_dir: Path) -> str:
    """A line for each checkpoint of a run: name, size, layout, validation loss."""
    lines = []
    for listed in _checkpoints_of(run_dir):
        try:
            state = open_checkpoint(listed.path).state
        except UserError:
            lines.append(f"{listed.path.name}: state.json cannot be read")
            continue
        lines.append(
            f"{listed.path.name}: {_gigabytes(listed.path)}, {_layout(state)}, "
            f"{_validation_loss(state)}"
        )
    return "\n".join(lines)


def description(path: Path) -> str:
    """What a checkpoint is of, from state.json and the tensors' metadata."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_ttt.checkpoint.reader import check_plain

    checkpoint = open_checkpoint(path)
    state, config = checkpoint.state, checkpoint.config
    described = flatten_tree({**config["model"], **config.get("mixers", {})})
    entries = check_plain(path).state_dict_metadata
    numbers, dtypes = Counter(), Counter()
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            part = "optimizer" if name.startswith("optimizer.") else "weights"
            numbers[part] += prod(entry.size)
            if part == "weights":
                dtypes[str(entry.properties.dtype).removeprefix("torch.")] += prod(entry.size)
    lines = {
        "path": path,
        "step": _step(checkpoint),
        "model": ", ".join(f"{key}={value}" for key, value in described.items()),
        "weights": f"{numbers['weights']:,} ({', '.join(sorted(dtypes))})",
        "optimizer": f"{numbers['optimizer']:,} numbers" if state["has_optimizer"] else "none",
        "layout": _layout(state),
        "validation": _validation_loss(state),
        "skipped steps": state.get("skipped_steps", 0),
        "size": _gigabytes(path),
        "megatron-core": state.get("megatron_core", "not recorded"),
        "torch": state.get("torch", "not recorded"),
    }
    return "\n".join(f"{key:>13}: {value}" for key, value in lines.items())


def verify(paths: list[Path]) -> dict[Path, str | None]:
    """What is wrong with each checkpoint, or each of a run folder's; None where nothing is."""
    folders = []
    for path in paths:
        inside = [listed.path for listed in list_checkpoints(path)]
        if not inside and not path.is_dir():
            raise UserError(f"{path} is no folder: name a checkpoint-STEP or a run folder")
        folders += inside or [path]
    return {folder: find_damage(folder) for folder in folders}


def prune_run(run_dir: Path, keep: int) -> list[Path]:
    """Remove old checkpoints, unless the newest is damaged: an old one may be all there is."""
    newest = _checkpoints_of(run_dir)[-1].path
    if damage := find_damage(newest):
        raise UserError(f"{newest} is damaged ({damage}): nothing was removed; delete it first")
    return prune(run_dir, keep)


def _checkpoints_of(run_dir: Path):
    if not (found := list_checkpoints(run_dir)):
        raise UserError(f"no checkpoints in {run_dir}: name a run folder")
    return found


def _step(checkpoint: Checkpoint) -> str:
    steps = checkpoint.config.get("training", {}).get("steps")
    return f"{checkpoint.step} of {steps}" if steps else str(checkpoint.step)


def _layout(state: dict) -> str:
    if (layout := state.get("layout")) is None:
        return "weights from elsewhere"
    virtual = f" x VPP {layout['virtual_pipeline']}" if layout["virtual_pipeline"] else ""
    sequence = " + SP" if layout["sequence_parallel"] else ""
    return (
        f"TP {layout['tensor']}{sequence} x PP {layout['pipeline']}{virtual} x DP {layout['data']}"
    )


def _validation_loss(state: dict) -> str:
    loss = state.get("val_loss")
    return "not validated" if loss is None else f"validation loss {loss:.4f}"


def _gigabytes(path: Path) -> str:
    return f"{sum(f.stat().st_size for f in path.rglob('*') if f.is_file()) / 1e9:.3f} GB"
