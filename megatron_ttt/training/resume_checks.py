"""What a run may not change when it goes on from a checkpoint, and what it is told of the rest.

Every key that changes what is trained is named with both its values. Left out are those that change
the rounding alone (layout, scan backend, recomputation), and `model`, which the store compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.config import Config, OptimizerConfig, to_dict
from megatron_ttt.errors import UserError
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate

_ORDER = "what it was trained on may come again, other text never"
_MOVED = f"unless it is the same under another path, {_ORDER}"
_TARGETS = "other targets count in the loss"
_SCHEDULE = "the schedules go on as if it had always been so"
_ALL_STEPS = "it holds for all steps from here on"
_WHY = {
    "run.seed": _ORDER,
    "training.seq_length": _ORDER,
    "training.steps": _SCHEDULE,
    "training.precision": _ALL_STEPS,
    "data.train": _MOVED,
    "data.fixed_batches": _MOVED,
    "data.tokenizer_model": "unless it is the same, ids may stand for other text",
    "data.mask_bos": _TARGETS,
    "data.bos_id": _TARGETS,
    "optimizer.lr": _SCHEDULE,
    "optimizer.min_lr": _SCHEDULE,
    "optimizer.warmup_fraction": _SCHEDULE,
    "optimizer.inner_lr_warmup": _SCHEDULE,
    "optimizer.weight_decay": _ALL_STEPS,
    "optimizer.beta1": _ALL_STEPS,
    "optimizer.beta2": _ALL_STEPS,
    "optimizer.eps": _ALL_STEPS,
    "optimizer.clip_grad": _ALL_STEPS,
}
"""The keys that may change, and what that does."""


def check_resume(checkpoint: Checkpoint, config: Config, log_line: Callable[[str], None]) -> None:
    """Refuse a configuration that cannot go on from a checkpoint; log what else it changes."""
    _refuse_other_parameter_groups(checkpoint, config)
    if checkpoint.step == 0:
        return
    _refuse_other_steps(checkpoint, config)
    for warning in _changes(checkpoint, config):
        log_line(f"Warning: {checkpoint.path} was trained with {warning}")


def _refuse_other_parameter_groups(checkpoint: Checkpoint, config: Config) -> None:
    if not checkpoint.state["has_optimizer"]:
        return
    there = checkpoint.config["optimizer"]["decay_all"]
    if there != config.optimizer.decay_all:
        raise UserError(
            f"{checkpoint.path} holds the optimizer of optimizer.decay_all={str(there).lower()}"
            ": set that, or export and import the weights to start anew with them"
        )


def _refuse_other_steps(checkpoint: Checkpoint, config: Config) -> None:
    here = config.training.global_batch_size
    there = checkpoint.config["training"]["global_batch_size"]
    if there != here:
        raise UserError(
            f"{checkpoint.path} was trained with training.global_batch_size={there}; going on "
            f"with {here} would repeat or skip data"
        )
    if checkpoint.step > config.training.steps:
        raise UserError(
            f"{checkpoint.path} is past training.steps={config.training.steps}: raise it"
        )


def _changes(checkpoint: Checkpoint, config: Config) -> Iterator[str]:
    changed, tree = [], to_dict(config)
    for key, why in _WHY.items():
        section, name = key.split(".")
        here = tree[section][name]
        there = checkpoint.config[section].get(name, here)
        # The tokenizer says what BOS is, where there is one.
        if there != here and not (name == "bos_id" and config.data.tokenizer_model):
            changed.append(key)
            yield f"{key}={there}, not {here}: {why}"
    if any(_WHY[key] == _SCHEDULE for key in changed):
        yield from _other_rates(checkpoint, config)


def _other_rates(checkpoint: Checkpoint, config: Config) -> Iterator[str]:
    """How the schedules' values of the next step differ."""
    before, step = _with_old_schedule(checkpoint, config), checkpoint.step + 1
    for what, schedule in (
        ("learning rate", learning_rate),
        ("factor of the inner learning rate", inner_lr_scale),
    ):
        there, here = schedule(before, step), schedule(config, step)
        if there != here:
            yield (
                f"another schedule: by it the {what} of step {step} would be {there:.4g}, now it "
                f"is {here:.4g}"
            )


def _with_old_schedule(checkpoint: Checkpoint, config: Config) -> Config:
    before = copy.deepcopy(config)
    before.training.steps = checkpoint.config["training"]["steps"]
    for field in fields(OptimizerConfig):
        there = checkpoint.config["optimizer"].get(
            field.name, getattr(before.optimizer, field.name)
        )
        setattr(before.optimizer, field.name, there)
    return before
