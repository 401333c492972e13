"""Errors of a disk while a checkpoint is written, which one rank may have and all must hear of."""

from __future__ import annotations

import contextlib
import queue
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException


class SaveError(Exception):
    """A checkpoint that could not be written; all ranks raise it at the same place."""


class HeldErrors:
    """The first error of this rank in a save, until `together` raises it on all ranks."""

    def __init__(self) -> None:
        self.first: str | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Note an error of the disk instead of raising it (torch's own are RuntimeErrors)."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.first = self.first or _one_line(error)

    def together(self, own: Any = None) -> list[Any]:
        """Each rank's `own`, in order of ranks. Raises SaveError if any rank holds an error."""
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (own, self.first))
        for rank, (_, error) in enumerate(everyone):
            if error is not None:
                raise SaveError(f"rank {rank}: {error}")
        return [own for own, _ in everyone]


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's way to write, but with `_write_files`, and an error in rank 0's last file,
    .metadata, is held: the other ranks wait for word from it then. `files`: names of what this rank
    writes."""

    def __init__(self, held: HeldErrors):
        super().__init__("torch_dist", 1)
        self.files: list[str] = []
        self._held = held

    def _get_save_and_finalize_callbacks(self, writer, *more):
        self.files = [name for _, name, _ in writer.write_buckets]
        # No reference to the writer, which holds all that is written: as part of a cycle it would
        # stay until Python next looks for cycles.
        finish = partial(type(writer).finish, weakref.proxy(writer))

        def held_finish(metadata, results):
            with self._held.hold():
                finish(metadata, results)

        writer.finish = held_finish
        request = super()._get_save_and_finalize_callbacks(writer, *more)
        if request.async_fn is None:
            return request
        return request._replace(async_fn=partial(_write_files, *request.async_fn.args))


def _write_files(transforms, use_msc: bool, rank: int, buckets: list, results) -> None:
    """Write each of this rank's files in a thread; put what was written, or why not, in `results`.

    megatron-core's own function takes processes or threads by its version. The newer one loses an
    error's words, and leaves the error in a cycle with the frames it passed, which hold a BytesIO's
    buffer: what CPython's garbage collector can crash on.
    """

    def write(index: int) -> tuple[int, list | Exception]:
        written, running = queue.SimpleQueue(), queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, index, buckets[index], written, running, use_fsync=True, use_msc=use_msc
        )
        return written.get()

    with ThreadPoolExecutor(len(buckets)) as threads:
        outcomes = dict(threads.map(write, range(len(buckets))))
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    for error in errors:
        traceback.clear_frames(error.__traceback__)
    results.put(_of_the_disk(errors[0]) if errors else outcomes)


def _of_the_disk(error: BaseException) -> BaseException:
    """The disk's own error, where torch raised one while it tidied up after that."""
    behind = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error


def in_words(error: SaveError | CheckpointException) -> str:
    """Why a save failed, in one line. Of a CheckpointException only rank 0 knows it."""
    if isinstance(error, SaveError):
        return str(error)
    for rank, (failure, _) in sorted(error.failures.items()):
        return f"rank {rank}: {_one_line(failure)}"
    return "on another rank"


def _one_line(error: BaseException) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.removeprefix("Worker failure: ")
