"""Writing checkpoints: under a temporary name, in the background on request, published when whole.

The training processes hold a snapshot only as long as it takes to fork (on CUDA, to copy to the
host): the forked writers check it, write it and sum it up, while training goes on. When all have
done, the checkpoint gets its manifest and its name: a moment of all ranks between two steps.

A disk may fail on one rank alone, at any file. That rank keeps its error (`faults.HeldErrors`)
until all ranks can hear of it, so that none is left waiting for it: then all give the checkpoint up
together, the temporary folder goes, and what was published before is as it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
import queue
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_ttt.checkpoint.faults import HeldErrors, SaveError, SaveStrategy, in_words
from megatron_ttt.checkpoint.manifest import describe, folder_files, write_durably
from megatron_ttt.checkpoint.state import checkpoint_tree, written_by
from megatron_ttt.checkpoint.store import STATE_FILE, publish, temporary_path
from megatron_ttt.errors import TrainingError, UserError
from megatron_ttt.platform.compat import (
    ResultsFile,
    guard_common_state,
    mcore_save_options,
    use_results_file,
)


class Checks(NamedTuple):
    """What a snapshot must pass before it is published.

    look: of this rank's memory, without communication; what it returns is pickled. A forked writer
    calls it, so that what is checked is what is written, and training does not wait for it. A fork
    cannot use CUDA: there it is called before, where the device reads all its memory in a moment.
    agree: of what `look` returned, collective: what goes into state.json besides. Raises
    TrainingError, on all ranks, where the snapshot must not be published.
    """

    look: Callable[[], Any]
    agree: Callable[[Any], dict[str, Any]]


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
        self._is_first = True

    def save(
        self,
        path: Path,
        chunks: list[nn.Module],
        optimizer,
        state: dict[str, Any],
        *,
        checks: Checks | None = None,
        published: Callable[[float], None] = lambda seconds: None,
    ) -> float:
        """Write a checkpoint folder; return how many seconds the caller was held up.

        chunks: unwrapped, with current weights, the same at every call; that together they hold
        each tensor once is looked at in the first. optimizer: None saves the weights alone. state:
        what goes into state.json, with at least `step` and `config`. published: called on rank 0
        when the folder has its name, with the seconds since this call. What `checks` raise comes
        out of the call that would publish: this one, or in the background `poll` or `wait`.
        """
        started = time.perf_counter()
        self.wait()
        held, results = HeldErrors(), ResultsFile()
        checks = checks or Checks(look=lambda: None, agree=lambda seen: {})
        state = {"has_optimizer": optimizer is not None, **written_by(), **state}
        with self._giving_up():
            self._new_folder(path, held)
            tree = checkpoint_tree(chunks, optimizer)
            guard_common_state(held.hold)
            strategy = SaveStrategy(held)
            # It asks tensors thousands of times for their shapes, and never for a CUDA device: what
            # the CPU platform has to say to each call would be a third of the stall.
            with torch._C.DisableTorchFunction():
                request = dist_checkpointing.save(
                    tree,
                    str(self._temporary),
                    sharded_strategy=strategy,
                    validate_access_integrity=self._is_first,
                    async_sharded_save=True,
                    **mcore_save_options(),
                )
            self._is_first = False
            look = checks.look
            if next(chunks[0].parameters()).is_cuda:
                seen = checks.look()
                look = lambda: seen  # noqa: E731
            write = partial(
                _write_and_describe,
                request.async_fn,
                [self._temporary / name for name in strategy.files],
                look,
                results,
            )

            def finish():
                self._publish(state, held, results, checks)
                if dist.get_rank() == 0:
                    published(time.perf_counter() - started)

            # megatron-core's own last file, metadata.json, is written there too.
            request.finalize_fns[1:] = [finish]
            if self.asynchronous:
                request = request._replace(async_fn=partial(_in_fork, write))
                self._calls.schedule_async_request(request)
            else:
                request._replace(async_fn=write).execute_sync()
        return time.perf_counter() - started

    def poll(self) -> None:
        """Publish what has been written; call it between steps."""
        if self._calls.get_num_unfinalized_calls():
            self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait until everything is written and published."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        with self._giving_up():
            self._calls.maybe_finalize_async_calls(blocking=blocking)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Leave nothing of a checkpoint that cannot be written, or must not be published."""
        try:
            yield
        except (SaveError, CheckpointException) as error:
            why = [in_words(error)]
            dist.broadcast_object_list(why)  # rank 0 alone has a CheckpointException's words
            self._discard()
            self.failure = why[0]
            self._failed(self._path, why[0])
        except TrainingError:
            self._discard()
            raise

    def _discard(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _new_folder(self, path: Path, held: HeldErrors) -> None:
        """A temporary folder of a name that no writer of a killed run can still be writing to."""
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        self._path, self._temporary = path, temporary_path(path, token[0])
        if dist.get_rank() == 0:
            with held.hold():
                self._temporary.mkdir(parents=True)
        held.together()

    def _publish(
        self, state: dict[str, Any], held: HeldErrors, results: ResultsFile, checks: Checks
    ) -> None:
        """Check off what all ranks have written, and give it its name."""
        folder = self._temporary
        own, seen = {}, None
        with held.hold():
            own, seen = _result(results)
        described = {name: file for one in held.together(own) for name, file in one.items()}
        state = {**state, **checks.agree(seen)}
        if dist.get_rank() == 0:
            with held.hold():
                save_config(CheckpointingConfig("torch_dist", 1), str(folder))
                write_durably(folder / STATE_FILE, json.dumps(state, indent=1))
                for name in set(folder_files(folder)) - set(described):
                    described[name] = describe(folder / name, durably=True)
                publish(folder, self._path, described)
        held.together()
        self.failure = None


def _in_fork(write: Callable, *arguments, **options) -> None:
    """What a forked writer does, which has none of its parent's threads, and its memory only until
    it writes to it."""
    gc.disable()
    torch.set_num_threads(1)
    write(*arguments, **options)


def _write_and_describe(
    write: Callable | None,
    files: list[Path],
    look: Callable[[], Any],
    results: ResultsFile,
    *arguments,
    **options,
) -> None:
    """Look at the memory, write this rank's files (write: None if it has none), and look at them
    while they are near."""
    seen, described = look(), {}
    if write is not None:
        write(*arguments, **options)
    with contextlib.suppress(OSError):  # `write` tells of files that are not there
        described = {path.name: describe(path, durably=True) for path in files}
    results.put((described, seen))


def _result(results: ResultsFile) -> tuple[dict[str, dict[str, int | str]], Any]:
    """What this rank's writer has put there."""
    try:
        return results.get_nowait()
    except queue.Empty:
        raise RuntimeError("the process that wrote it ended early") from None


def _refuse(path: Path, why: str) -> None:
    raise UserError(f"{path} could not be written: {why}")


def save_checkpoint(path: Path, chunks: list[nn.Module], optimizer, state: dict[str, Any]) -> None:
    """Write and publish one checkpoint folder (see `CheckpointWriter.save`)."""
    CheckpointWriter().save(path, chunks, optimizer, state)
