"""Errors of one rank while a checkpoint is written: of its disk, its memory, its machine.

All ranks must hear of them, and none must wait for one that has given up. So a save is made of
parts that are a rank's own, within `DeferredErrors.capture`, and before each communication between
them stands `DeferredErrors.raise_on_all`: that is the next thing a rank that has failed takes part
in, too, and there all of them raise.
"""

from __future__ import annotations

import contextlib
import queue
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

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


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's way to write, but the ranks agree before each of its communications, and it
    writes with `_write_files`. `files`: names of what this rank writes."""

    def __init__(self, held: DeferredErrors):
        super().__init__("torch_dist", 1)
        self.files: list[str] = []
        self._held = held

    def async_save(self, sharded_state_dict, checkpoint_dir, *_) -> AsyncRequest:
        """What is to be written, and then communicated, as super() has it without its caches."""
        tensors, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = _Writer(checkpoint_dir, thread_count=self.thread_count)
        writer.held = self._held
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(tensors, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self.files = [name for _, name, _ in writer.write_buckets]
        write, preload, arguments = writer.get_save_function_and_args()
        if write is not None:
            write = partial(_write_files, *write.args)
        finish = partial(save_state_dict_async_finalize, *planned)
        return AsyncRequest(write, arguments, [finish], preload_fn=preload)


class _Writer(FileSystemWriterAsync):
    """megatron-core's writer, whose three steps before and after a communication are this rank's
    own."""

    held: DeferredErrors

    def prepare_local_plan(self, plan):
        """The last step before the plans are gathered."""
        plan = super().prepare_local_plan(plan)
        self.held.raise_on_all()
        return plan

    def retrieve_write_results(self):
        """The last step before what was written is gathered."""
        results = None
        with self.held.capture():
            results = super().retrieve_write_results()
        self.held.raise_on_all()
        return results

    def finish(self, metadata, results) -> None:
        """Rank 0's last file, .metadata, while the others wait for word from it."""
        with self.held.capture():
            super().finish(metadata, results)


def _write_files(transforms, use_msc: bool, rank: int, buckets: list, results) -> None:
    """Write each of this rank's files in a thread; put what was written in `results`.

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
    if errors:
        raise _of_the_disk(errors[0])
    results.put(outcomes)


def _of_the_disk(error: BaseException) -> BaseException:
    """The disk's own error, where torch raised one while it tidied up after that."""
    behind = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error


def one_line(error: BaseException) -> str:
    """The first line of an error, or what it is called."""
    return (str(error).splitlines() or [type(error).__name__])[0]
