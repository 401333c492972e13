"""Workarounds in the way megatron-core reads a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def reading_with(reader: Callable[[str], Any]) -> Iterator[None]:
    """Let `dist_checkpointing.load` read a folder through `reader(folder)`.

    Seen in: 0.16.1, 0.19.2
    Symptom: torch's FileSystemReader unpickles `.metadata`, so loading a checkpoint of unknown
        origin runs whatever code the file names. `load` takes a strategy, but no reader.
    Upstream: https://github.com/pytorch/pytorch/issues/189308
    Done: the function that makes the reader is replaced while the context lasts, in each module
        that holds it: `strategies.torch`, and in the newer versions `serialization` too.
    """
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
