"""Which checkpoint a run goes on from, loading it, and what becomes of those after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from megatron_ttt.checkpoint.run_folder import (
    Checkpoint,
    check_architecture,
    find_newest,
    list_checkpoints,
    quarantine,
    remove_leftovers,
    write_pointer,
)
from megatron_ttt.checkpoint.state import check_versions, load_checkpoint, load_weights
from megatron_ttt.checkpoint.verification import damage_found_together, open_whole_together
from megatron_ttt.config import Config
from megatron_ttt.data.fingerprint import check_unchanged
from megatron_ttt.errors import UserError, run_on_rank0
from megatron_ttt.hf.background import remove_unfinished
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.loggers import log_line, log_on_rank0
from megatron_ttt.training.optimizer import set_options
from megatron_ttt.training.optimizer_checks import check_loaded
from megatron_ttt.training.resume_checks import check_resume


def find_checkpoint(config: Config, data: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint a run goes on from (see `checkpoint.load`), None for one that starts anew.

    data: what its files are now, of `fingerprints`. Raises UserError for one that it cannot go on
    from. Collective.
    """
    run_dir, load = Path(config.run.dir), config.checkpoint.load
    listed = run_on_rank0(lambda: _tidy(run_dir))
    checkpoint = find_newest(listed, log_on_rank0, damage_found_together)
    if load == "none" and checkpoint is not None:
        raise UserError(
            f"checkpoint.load=none, but {checkpoint.path} exists: set another run.dir, or "
            "checkpoint.load=auto to go on from it"
        )
    if load not in ("auto", "none"):
        named = open_whole_together(load)
        if checkpoint is None or _goes_back(checkpoint, named, config):
            checkpoint = named
    run_on_rank0(lambda: _check(checkpoint, config, data))
    return checkpoint


def restore(
    checkpoint: Checkpoint, chunks: list[nn.Module], optimizer, config: Config
) -> tuple[int, int]:
    """Load a checkpoint and set aside those after it; return its step, and how many steps had been
    skipped by then: 0, 0 for one of weights alone.

    chunks: unwrapped. Raises TrainingError where the optimizer is not what was saved. Collective.
    """
    step = skipped_steps = 0
    if checkpoint.state["has_optimizer"]:
        load_checkpoint(checkpoint, config, chunks, optimizer)
        set_options(optimizer, config)
        check_loaded(checkpoint, chunks, optimizer)
        step, skipped_steps = checkpoint.step, checkpoint.state.get("skipped_steps", 0)
    else:
        load_weights(checkpoint, chunks)
        optimizer.reload_model_params()
    log_on_rank0(f"Resumed from {checkpoint.path} at step {step}")
    if is_own(checkpoint, Path(config.run.dir)):
        run_on_rank0(lambda: _quarantine_later_checkpoints(checkpoint))
    return step, skipped_steps


def _tidy(run_dir: Path) -> list:
    remove_leftovers(run_dir)
    remove_unfinished(run_dir)
    return list_checkpoints(run_dir)


def _check(checkpoint: Checkpoint | None, config: Config, data: dict[str, Any]) -> None:
    if checkpoint is None:
        return
    check_versions(checkpoint)
    check_architecture(checkpoint, architecture_of(config), log_line)
    check_resume(checkpoint, config, log_line)
    if is_own(checkpoint, Path(config.run.dir)):
        check_unchanged(checkpoint.state.get("data", {}), data)


def is_own(checkpoint: Checkpoint, run_dir: Path) -> bool:
    """Whether a checkpoint is of the run in this folder."""
    return checkpoint.path.resolve().parent == run_dir.resolve()


def _goes_back(newest: Checkpoint, named: Checkpoint, config: Config) -> bool:
    """Whether checkpoint.load means to go back to this one of the run's own. It does once: what was
    trained since by the same command is gone on from, by a restart too."""
    load = config.checkpoint.load
    since = newest.step > named.step and newest.config["checkpoint"].get("load") == load
    return is_own(named, Path(config.run.dir)) and not since


def _quarantine_later_checkpoints(checkpoint: Checkpoint) -> None:
    """Rename the checkpoints after the one that a run goes on from. Raises UserError."""
    run_dir = checkpoint.path.parent
    try:
        if aside := quarantine(run_dir, checkpoint.step):
            write_pointer(checkpoint.path)
            names = ", ".join(path.name for path in aside)
            log_line(f"Set aside what was after that step, damaged or not wanted: {names}")
    except OSError as error:
        raise UserError(
            f"cannot rename checkpoints in run.dir={run_dir}: {error.strerror}"
        ) from None
