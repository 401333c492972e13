"""What differs between the versions of megatron-core; the only file that knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from megatron.core import dist_checkpointing


def mcore_save_options() -> dict[str, Any]:
    """Arguments with which `dist_checkpointing.save` saves in the background by its own means.

    From 0.17 on its default is a package of its own, which is not required here.
    """
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}


def guard_common_state(guard: Callable[[], AbstractContextManager]) -> None:
    """Let later saves write rank 0's common.pt within guard().

    Newer versions have no such file; what was in it is written with the rest.
    """
    try:
        from megatron.core.dist_checkpointing.strategies.base import (
            StrategyAction,
            register_default_strategy,
        )
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
    except ImportError:
        return

    class GuardedStrategy(TorchCommonSaveStrategy):
        def save_common(self, common_state_dict, checkpoint_dir):
            with guard():
                super().save_common(common_state_dict, checkpoint_dir)

    guarded = GuardedStrategy("torch", 1)
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, guarded)
