"""Writing checkpoints: under a temporary name, in the background on request, published when whole.

The training processes hold a snapshot only as long as it takes to fork (on CUDA, to copy to the
host): the forked writers check it, write it and sum it up, while training goes on. When all have
done, the checkpoint gets its manifest and its name: a moment of all ranks between two steps.

A machine may fail one rank alone, at any moment: its disk, its memory, its processes. That rank
keeps its error (`save_errors.DeferredErrors`) until all ranks can hear of it, so that none is left
waiting for it: then all give the checkpoint up together, the temporary folder goes, and what was
published before is as it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
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
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import nn

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_durably
from megatron_ttt.checkpoint.run_folder import STATE_FILE, publish, temporary_path
from megatron_ttt.checkpoint.save_errors import (
    OF_THE_MACHINE,
    DeferredErrors,
    SaveError,
    one_line,
)
from megatron_ttt.checkpoint.state import checkpoint_tree, written_by
from megatron_ttt.errors import TrainingError, UserError
from megatron_ttt.platform.compat import mcore_save_options
from megatron_ttt.platform.mcore_workarounds.saving import (
    ResultsFile,
    SaveStrategy,
    use_results_file,
)


class Checks(NamedTuple):
    """What a snapshot must pass before it is published.

    compute: of this rank's memory, without communication; what it returns is pickled. A forked
    writer calls it, so that what is checked is what is written, and training does not wait for it.
    A fork cannot use CUDA: there it is called before, where the device reads all its memory in a
    moment.
    compare: of what `compute` returned, collective: what goes into state.json besides. Raises
    TrainingError, on all ranks, where the snapshot must not be published.
    """

    compute: Callable[[], Any]
    compare: Callable[[Any], dict[str, Any]]


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
        self._process: multiprocessing.Process | None = None  # the forked writer, and
        self._finish: Callable[[], None] | None = None  # what is left to do when all have ended
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
        held = DeferredErrors()
        checks = checks or Checks(compute=lambda: None, compare=lambda seen: {})
        state = {"has_optimizer": optimizer is not None, **written_by(), **state}
        self._device = next(chunks[0].parameters()).device
        with self._giving_up():
            self._new_folder(path, held)
            # What fails before a moment of all ranks within is held, and told at the one below.
            with held.capture():
                tree = checkpoint_tree(chunks, optimizer)
                if self._is_first:
                    save_preprocess(tree, validate_access_integrity=True)
                results = ResultsFile()
                write, finalize = self._plan(tree, held, results, checks.compute)
                if self.asynchronous:
                    self._process = _fork(write, results)
                else:
                    write()
            held.raise_on_all()
            self._is_first = False

            def finish() -> None:
                self._publish(state, held, results, checks, finalize)
                if dist.get_rank() == 0:
                    published(time.perf_counter() - started)

            if self.asynchronous:
                self._finish = finish
            else:
                finish()
        return time.perf_counter() - started

    def poll(self) -> None:
        """Publish what has been written; call it between steps."""
        if self._process is not None:
            running = torch.tensor(int(self._process.is_alive()), device=self._device)
            dist.all_reduce(running, dist.ReduceOp.MAX)
            if not running.item():
                self.wait()

    def wait(self) -> None:
        """Wait until everything is written and published."""
        if self._process is None:
            return
        self._end_process()
        finish, self._finish = self._finish, None
        with self._giving_up():
            finish()

    def _end_process(self) -> None:
        self._process.join()
        self._process.close()
        self._process = None

    def _plan(
        self,
        tree: dict[str, Any],
        held: DeferredErrors,
        results: ResultsFile,
        compute: Callable[[], Any],
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """How this rank's files are written, which is not collective, and what megatron-core does
        when all ranks have, which is."""
        strategy = SaveStrategy(held)
        # It asks tensors thousands of times for their shapes, and never for a CUDA device: what the
        # CPU platform has to say to each call would be a third of the stall.
        with torch._C.DisableTorchFunction():
            request = dist_checkpointing.save(
                tree,
                str(self._temporary),
                sharded_strategy=strategy,
                validate_access_integrity=False,
                async_sharded_save=True,
                **mcore_save_options(),
            )
        if self._device.type == "cuda":
            seen = compute()
            compute = lambda: seen  # noqa: E731
        arguments = list(request.async_fn_args)
        if request.async_fn is not None:
            arguments[1] = request.preload_fn()  # what is written, in the host's memory
        files = [self._temporary / name for name in strategy.files]
        write = partial(_write_and_describe, request.async_fn, arguments, files, compute, results)
        # megatron-core's own last file, metadata.json, is written with ours.
        return write, request.finalize_fns[0]

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Leave nothing of a checkpoint that cannot be written, or must not be published."""
        try:
            yield
        except SaveError as error:
            if self._process is not None:  # another rank has none
                self._process.kill()
                self._end_process()
            self._discard()
            self.failure = str(error)
            self._failed(self._path, self.failure)
        except TrainingError:
            self._discard()
            raise

    def _discard(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _new_folder(self, path: Path, held: DeferredErrors) -> None:
        """A temporary folder of a name that no writer of a killed run can still be writing to."""
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        self._path, self._temporary = path, temporary_path(path, token[0])
        if dist.get_rank() == 0:
            with held.capture():
                self._temporary.mkdir(parents=True)
        held.raise_on_all()

    def _publish(
        self,
        state: dict[str, Any],
        held: DeferredErrors,
        results: ResultsFile,
        checks: Checks,
        finalize: Callable[[], None],
    ) -> None:
        """Check off what all ranks have written, and give it its name."""
        folder = self._temporary
        own, seen = {}, None
        with held.capture():
            own, seen = _result(results)
        described = {name: file for one in held.raise_on_all(own) for name, file in one.items()}
        finalize()
        state = {**state, **checks.compare(seen)}
        if dist.get_rank() == 0 and held.first is None:
            with held.capture():
                save_config(CheckpointingConfig("torch_dist", 1), str(folder))
                write_durably(folder / STATE_FILE, json.dumps(state, indent=1))
                for name in set(folder_files(folder)) - set(described):
                    described[name] = describe(folder / name, durably=True)
                publish(folder, self._path, described)
        held.raise_on_all()
        self.failure = None


def _fork(write: Callable[[], None], results: ResultsFile) -> multiprocessing.Process:
    """Begin to write in a process of its own, which tells what becomes of it in `results`."""
    process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(write, results))
    collects = gc.isenabled()
    gc.disable()  # in the fork, that is: from its first moment
    try:
        process.start()
    finally:
        if collects:
            gc.enable()
    return process


def _in_fork(write: Callable[[], None], results: ResultsFile) -> None:
    """What a forked writer does, which has none of its parent's threads, and its memory only until
    it writes to it."""
    torch.set_num_threads(1)
    try:
        write()
    except OF_THE_MACHINE as error:
        results.put(one_line(error))


def _write_and_describe(
    write: Callable | None,
    arguments: list[Any],
    files: list[Path],
    compute: Callable[[], Any],
    results: ResultsFile,
) -> None:
    """Compute the checks of this rank's memory, write its files (write: None if it has none), and
    describe them while they are in the page cache."""
    seen = compute()
    if write is not None:
        write(*arguments)
    results.put(({path.name: describe(path, durably=True) for path in files}, seen))


def _result(results: ResultsFile) -> tuple[dict[str, dict[str, int | str]], Any]:
    """What this rank's writer has put there."""
    try:
        result = results.get_nowait()
    except queue.Empty:
        raise RuntimeError("the process that wrote it ended early") from None
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _refuse(path: Path, why: str) -> None:
    raise UserError(f"{path} could not be written: {why}")


def save_checkpoint(path: Path, chunks: list[nn.Module], optimizer, state: dict[str, Any]) -> None:
    """Write and publish one checkpoint folder (see `CheckpointWriter.save`)."""
    CheckpointWriter().save(path, chunks, optimizer, state)
