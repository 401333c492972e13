"""Writing checkpoints: under a temporary name, in the background on request, published when whole.

The training processes hold a snapshot only as long as it takes to fork (on CUDA, to copy to the
host): the forked writers write it, while training goes on. When all have done, the checkpoint is
checked off file by file and gets its name; that takes all ranks a moment between two steps.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_durably
from megatron_ttt.checkpoint.state import checkpoint_tree
from megatron_ttt.checkpoint.store import STATE_FILE, publish, temporary_path
from megatron_ttt.platform.compat import asynchronous_save_options


class CheckpointWriter:
    """Saves one checkpoint at a time. All its methods are collective."""

    def __init__(self, *, asynchronous: bool = False):
        self.asynchronous = asynchronous
        self._calls = AsyncCallsQueue(persistent=False)

    def save(
        self,
        path: Path,
        chunks: list[nn.Module],
        optimizer,
        state: dict[str, Any],
        published: Callable[[float], None] = lambda seconds: None,
    ) -> float:
        """Write a checkpoint folder; return how many seconds the caller was held up.

        chunks: unwrapped, with current weights. optimizer: None saves the weights alone. state:
        what goes into state.json, with at least `step` and `config`. published: called on rank 0
        when the folder has its name, with the seconds since this call.
        """
        started = time.perf_counter()
        self.wait()
        temporary = self._new_folder(path)
        tree = checkpoint_tree(chunks, optimizer)
        text = json.dumps({"has_optimizer": optimizer is not None, **state}, indent=1)

        def finish():
            if dist.get_rank() == 0:
                write_durably(temporary / STATE_FILE, text)
            dist.barrier()
            described = _describe_together(temporary)
            if dist.get_rank() == 0:
                publish(temporary, path, described)
                published(time.perf_counter() - started)
            dist.barrier()

        if self.asynchronous:
            request = dist_checkpointing.save(tree, str(temporary), **asynchronous_save_options())
            request.add_finalize_fn(finish)
            self._calls.schedule_async_request(request)
        else:
            dist_checkpointing.save(tree, str(temporary))
            finish()
        return time.perf_counter() - started

    def poll(self) -> None:
        """Publish what has been written; call it between steps."""
        if self._calls.get_num_unfinalized_calls():
            self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait until everything is written and published."""
        self._calls.maybe_finalize_async_calls(blocking=True)

    def _new_folder(self, path: Path) -> Path:
        """A temporary folder of a name that no writer of a killed run can still be writing to."""
        name = [secrets.token_hex(4)]
        dist.broadcast_object_list(name)
        temporary = temporary_path(path, name[0])
        if dist.get_rank() == 0:
            temporary.mkdir(parents=True)
        dist.barrier()
        return temporary


def save_checkpoint(path: Path, chunks: list[nn.Module], optimizer, state: dict[str, Any]) -> None:
    """Write and publish one checkpoint folder (see `CheckpointWriter.save`)."""
    CheckpointWriter().save(path, chunks, optimizer, state)


def _describe_together(folder: Path) -> dict[str, dict[str, int | str]]:
    """`manifest.describe` of every file of a folder, which all ranks see; each does its share."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = {name: describe(folder / name) for name in folder_files(folder)[rank::ranks]}
    everyone = [None] * ranks
    dist.all_gather_object(everyone, own)
    return {name: seen for one in everyone for name, seen in one.items()}
