"""Errors of one rank while a checkpoint is written: of its disk, its memory, its machine.

All ranks must hear of them, and none must wait for one that has given up. So a save is made of
parts that are a rank's own, within `DeferredErrors.capture`, and before each communication between
them stands `DeferredErrors.raise_on_all`: that is the next thing a rank that has failed takes part
in, too, and there all of them raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

OF_THE_MACHINE = (OSError, RuntimeError, MemoryError)
"""What a machine's want of something becomes; torch's own are RuntimeErrors."""


class SaveError(Exception):
    """A checkpoint that could not be written; all ranks raise it at the same place."""


class DeferredErrors:
    """The first error of this rank in a save, until `together` raises it on all ranks."""

    def __init__(self) -> None:
        self.first: str | None = None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Note an error of the machine instead of raising it."""
        try:
            yield
        except OF_THE_MACHINE as error:
            self.first = self.first or one_line(error)

    def raise_on_all(self, own: Any = None) -> list[Any]:
        """Each rank's `own`, in order of ranks. Raises SaveError if any rank holds an error."""
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (own, self.first))
        for rank, (_, error) in enumerate(everyone):
            if error is not None:
                raise SaveError(f"rank {rank}: {error}")
        return [own for own, _ in everyone]


def one_line(error: BaseException) -> str:
    """The first line of an error, or what it is called."""
    return (str(error).splitlines() or [type(error).__name__])[0]
