"""What differs between the versions of megatron-core; the only file that knows them."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import dist_checkpointing


def asynchronous_save_options() -> dict[str, Any]:
    """Arguments with which `dist_checkpointing.save` saves in the background by its own means.

    From 0.17 on its default is a package of its own, which is not required here.
    """
    parameters = inspect.signature(dist_checkpointing.save).parameters
    strategy = {"async_strategy": "mcore"} if "async_strategy" in parameters else {}
    return {"async_sharded_save": True, **strategy}
