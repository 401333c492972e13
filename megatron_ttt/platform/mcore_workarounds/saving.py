"""Workarounds in the way megatron-core writes a checkpoint."""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
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
from torch import Tensor


def use_results_file() -> None:
    """Let forked writers hand their results over through an unnamed file.

    Seen in: 0.16.1, 0.19.2
    Symptom: the queue that megatron-core makes for them is a helper process per rank, of a quarter
        of a gigabyte, which imports the main script, and torch with it, at the first save, and
        outlives a rank that is killed.
    Done: the module's queue is a `ResultsFile` before megatron-core would make its own.
    """
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    importlib.import_module(name)._results_queue = ResultsFile()


class ResultsFile:
    """A queue of one item, between a process and its forks."""

    def __init__(self) -> None:
        # In memory: the disk may be full, which is then what there is to report.
        self._file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, item: Any) -> None:
        """Write the item, pickled, in the place of one before."""
        self._file.seek(0)
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Take the item out. Raises queue.Empty where there is none."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        finally:
            self._file.seek(0)
            self._file.truncate()


def with_own_storage(tensor: Tensor) -> Tensor:
    """Return the same memory, under a storage that begins and ends with the tensor.

    Seen in: 0.16.1, 0.19.2
    Symptom: megatron-core copies every view on the CPU before it writes it, while training waits;
        parameters and optimizer state are views of large buffers.
    Done: the tensor is wrapped anew around its memory. One that is not contiguous stays as it is.
    """
    if not tensor.is_contiguous():
        return tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().view(integers[tensor.element_size()])
    return torch.from_numpy(bits.numpy()).view(tensor.dtype)


class HeldErrors(Protocol):
    """Keeps an error of this rank until all ranks can hear of it."""

    def capture(self) -> AbstractContextManager[None]:
        """Keep an error of the machine instead of raising it."""

    def raise_on_all(self) -> Any:
        """Raise on all ranks if any rank holds an error. Collective."""


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy, but the ranks agree before each of its communications.

    Seen in: 0.16.1, 0.19.2
    Symptom: a rank whose disk or memory fails raises before a communication, and the others wait
        in it until the process group times out: while the save is planned, and on all but rank 0
        while that writes `.metadata`.
    Done: `async_save` plans with a writer that calls `held.raise_on_all()` before each
        communication, and writes with `_write_files`. It does without super()'s caches.

    held: of this save. files: the names of the files that this rank writes.
    """

    def __init__(self, held: HeldErrors):
        super().__init__("torch_dist", 1)
        self.files: list[str] = []
        self._held = held

    def async_save(self, sharded_state_dict, checkpoint_dir, *_) -> AsyncRequest:
        """Return what is to be written, and then communicated."""
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
    """megatron-core's writer in `SaveStrategy`: its three steps next to a communication."""

    held: HeldErrors

    def prepare_local_plan(self, plan):
        """Take the last step before the plans are gathered."""
        plan = super().prepare_local_plan(plan)
        self.held.raise_on_all()
        return plan

    def retrieve_write_results(self):
        """Take the last step before what was written is gathered."""
        results = None
        with self.held.capture():
            results = super().retrieve_write_results()
        self.held.raise_on_all()
        return results

    def finish(self, metadata, results) -> None:
        """Write rank 0's last file, .metadata, while the others wait for word from it."""
        with self.held.capture():
            super().finish(metadata, results)


def _write_files(transforms, use_msc: bool, rank: int, buckets: list, results) -> None:
    """Write each of this rank's files in a thread; put what was written in `results`.

    Seen in: 0.16.1, 0.19.2
    Symptom: 0.16.1 forks a process for each file, from a process that is a fork already. 0.19.2
        uses threads, but loses the words of an error, and leaves the error in a cycle with the
        frames it passed, which hold the buffer of a BytesIO: CPython's garbage collector can crash
        on that (seen after hours only).
    Done: megatron-core's function for one file is called in threads, and the error that the disk
        raised is raised again, after its frames are cleared.
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
