"""What differs between the versions of megatron-core; the only file that knows them."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import queue
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def use_results_file() -> None:
    """Let forked writers hand their results over through an unnamed file.

    megatron-core's own means is a helper process of a quarter of a gigabyte per rank, which imports
    torch at the first save, and outlives a rank that is killed.
    """
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    importlib.import_module(name)._results_queue = ResultsFile()


class ResultsFile:
    """A queue of one item, between a process and its forks."""

    def __init__(self) -> None:
        # In memory: the disk may be full, which is what it then has to tell.
        self._file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, item: Any) -> None:
        self._file.seek(0)
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        finally:
            self._file.seek(0)
            self._file.truncate()


@contextmanager
def reading_with(reader: Callable[[str], Any]) -> Iterator[None]:
    """Let `dist_checkpointing.load` read a folder through `reader(folder)`, not by its own means,
    which unpickle what is there. The newer versions look those up in two modules."""
    name, package = "_get_filesystem_reader", "megatron.core.dist_checkpointing"
    modules = [importlib.import_module(f"{package}.strategies.torch")]
    serialization = importlib.import_module(f"{package}.serialization")
    if hasattr(serialization, name):
        modules.append(serialization)
    own = getattr(modules[0], name)
    for module in modules:
        setattr(module, name, lambda folder, *_, **__: reader(folder))
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, own)
