"""What differs between the versions of megatron-core; the only file that knows them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import megatron.core
from megatron.core import dist_checkpointing
from torch import Tensor

WITHOUT_COMMON_FILE = (0, 19)
"""From here on a checkpoint has no common.pt, which versions before ask for first."""


def mcore_version() -> str:
    """Of megatron-core, as it is recorded in checkpoints."""
    return megatron.core.__version__


def reads_checkpoints_of(written: str) -> bool:
    """Whether this megatron-core knows the format of the version that wrote a checkpoint: each one
    knows the older."""
    return _numbers(written) < WITHOUT_COMMON_FILE or _numbers(mcore_version()) >= (
        WITHOUT_COMMON_FILE
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version: the first two."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def mcore_save_options() -> dict[str, Any]:
    """Arguments with which `dist_checkpointing.save` saves in the background by its own means.

    From 0.17 on its default is a package of its own, which is not required here.
    """
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}


def gradients_for_norm(optimizer) -> list[Tensor]:
    """Of one of megatron-core's optimizers: this rank's gradients that count in the norm.

    What tensor-parallel ranks hold alike is on one of them alone. Renamed after 0.16.
    """
    if hasattr(optimizer, "get_main_grads_for_grad_norm"):
        return optimizer.get_main_grads_for_grad_norm()
    return optimizer.get_grads_for_grad_norm()
