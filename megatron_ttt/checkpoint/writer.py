"""Writing checkpoints: under a temporary name, in the background on request, published when whole.

The training processes hold a snapshot only as long as it takes to fork (on CUDA, to copy to the
host): the forked writers write it and sum it up, while training goes on. When all have done, the
checkpoint gets its manifest and its name; that takes all ranks a moment between two steps.

A disk may fail on one rank alone, at any file. That rank keeps its error (`faults.HeldErrors`)
until all ranks can hear of it, so that none is left waiting for it: then all give the checkpoint up
together, the temporary folder goes, and what was published before is as it was.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_ttt.checkpoint.faults import HeldErrors, SaveError, SaveStrategy, in_words
from megatron_ttt.checkpoint.manifest import describe, folder_files, write_durably
from megatron_ttt.checkpoint.state import checkpoint_tree
from megatron_ttt.checkpoint.store import STATE_FILE, publish, temporary_path
from megatron_ttt.errors import UserError
from megatron_ttt.platform.compat import (
    ResultsFile,
    guard_common_state,
    mcore_save_options,
    use_results_file,
)


class CheckpointWriter:
    """Saves one checkpoint at a time. All its methods are collective.

    failure: why the last checkpoint could not be written, None if it could; the same on all ranks.
    """

    def __init__(
        self,
        *,
        asynchronous: bool = False,
        failed: Callable[[Path, str], None] | None = None,
    ):
        """failed: called on all ranks when a checkpoint could not be written, with its path and
        why; without it, that is a UserError."""
        self.asynchronous = asynchronous
        self.failure: str | None = None
        self._failed = failed or _refuse
        self._calls = AsyncCallsQueue(persistent=False)
        use_results_file()
        self._path = self._temporary = Path()

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
        held = HeldErrors()
        try:
            self._new_folder(path, held)
            tree = checkpoint_tree(chunks, optimizer)
            text = json.dumps({"has_optimizer": optimizer is not None, **state}, indent=1)
            guard_common_state(held.hold)
            strategy, checksums = SaveStrategy(held), ResultsFile()
            request = dist_checkpointing.save(
                tree,
                str(self._temporary),
                sharded_strategy=strategy,
                async_sharded_save=True,
                **mcore_save_options(),
            )
            if strategy.files:
                write = partial(
                    _write_and_describe,
                    request.async_fn,
                    [self._temporary / name for name in strategy.files],
                    checksums,
                )
                request = request._replace(async_fn=write)

            def finish():
                self._publish(text, held, checksums)
                if dist.get_rank() == 0:
                    published(time.perf_counter() - started)

            # megatron-core's own last file, metadata.json, is written there too.
            request.finalize_fns[1:] = [finish]
            if self.asynchronous:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()
        except (SaveError, CheckpointException) as error:
            self._give_up(error)
        return time.perf_counter() - started

    def poll(self) -> None:
        """Publish what has been written; call it between steps."""
        if self._calls.get_num_unfinalized_calls():
            self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait until everything is written and published."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        try:
            self._calls.maybe_finalize_async_calls(blocking=blocking)
        except (SaveError, CheckpointException) as error:
            self._give_up(error)

    def _new_folder(self, path: Path, held: HeldErrors) -> None:
        """A temporary folder of a name that no writer of a killed run can still be writing to."""
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        self._path, self._temporary = path, temporary_path(path, token[0])
        if dist.get_rank() == 0:
            with held.hold():
                self._temporary.mkdir(parents=True)
        held.together()

    def _publish(self, state: str, held: HeldErrors, checksums: ResultsFile) -> None:
        """Check off what all ranks have written, and give it its name."""
        folder = self._temporary
        if dist.get_rank() == 0:
            with held.hold():
                save_config(CheckpointingConfig("torch_dist", 1), str(folder))
                write_durably(folder / STATE_FILE, state)
        own = {}
        with contextlib.suppress(queue.Empty):
            own = checksums.get_nowait()
        described = {name: seen for one in held.together(own) for name, seen in one.items()}
        if dist.get_rank() == 0:
            with held.hold():
                for name in set(folder_files(folder)) - set(described):
                    described[name] = describe(folder / name)
                publish(folder, self._path, described)
        held.together()
        self.failure = None

    def _give_up(self, error: SaveError | CheckpointException) -> None:
        """Remove what was written of a checkpoint, and tell why on all ranks."""
        why = [in_words(error)]
        dist.broadcast_object_list(why)  # rank 0 alone has a CheckpointException's words
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self.failure = why[0]
        self._failed(self._path, why[0])


def _write_and_describe(
    write: Callable, files: list[Path], checksums: ResultsFile, *arguments, **options
) -> None:
    """What a forked writer does: write this rank's files, and look at them while they are near."""
    write(*arguments, **options)
    with contextlib.suppress(OSError):  # `write` tells of files that are not there
        checksums.put({path.name: describe(path) for path in files})


def _refuse(path: Path, why: str) -> None:
    raise UserError(f"{path} could not be written: {why}")


def save_checkpoint(path: Path, chunks: list[nn.Module], optimizer, state: dict[str, Any]) -> None:
    """Write and publish one checkpoint folder (see `CheckpointWriter.save`)."""
    CheckpointWriter().save(path, chunks, optimizer, state)
