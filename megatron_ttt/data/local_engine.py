"""The tasks of a run on the cores of this machine.

Each worker does whole tasks, reading and writing included: the parent hands out shards and counts.
Where there are fewer shards than workers, a worker shares the encoding of its shard with helpers of
its own, which hand back bytes that it appends in the order of the blocks. The output does not
depend on any of these numbers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from megatron_ttt.data.atomic_file import partial_suffix, remove_partials
from megatron_ttt.data.encoder import EncodedBlock, Encoder, Options, encode_here
from megatron_ttt.data.reader import MAX_DOCUMENT_BYTES, Block
from megatron_ttt.data.shard_jobs import BuildJob, Listener, shard_items, write_tasks
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

_BLOCKS_PER_WORKER = 8
"""Blocks that wait for a worker or come from it: about 4 MB for each worker."""
_BYTES_PER_WORKER = MAX_DOCUMENT_BYTES
"""The same where documents are very long."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_locally(
    job: BuildJob,
    shards: Sequence[Shard],
    encoder: Encoder,
    listener: Listener,
    workers: int,
) -> None:
    """Do the tasks of the shards. Raises `UserError` as soon as one task does, or a worker dies;
    tasks that are done then stay done."""
    if len(shards) > 1 and workers > 1:
        _run_tasks(job, shards, listener, workers)
        return
    items = encode_in_order(shard_items(shards, job.options), encoder, workers)
    write_tasks(job, shards, items, encoder.dtype, listener)


def _run_tasks(job: BuildJob, shards: Sequence[Shard], listener: Listener, workers: int) -> None:
    todo, count = deque(shards), min(workers, len(shards))
    helpers = [workers // count + (number < workers % count) for number in range(count)]
    pool = _Processes()
    try:
        pool.start(_do_tasks, [(job, number) for number in helpers], daemon=False)
        idle, busy = list(pool.pipes), []
        while todo or busy:
            while todo and idle:
                busy.append(idle.pop())
                busy[-1].send(todo.popleft())
            for pipe in wait(busy):
                name, *values = pipe.recv()
                if name == "failed":
                    raise values[0]
                if name == "done":
                    busy.remove(pipe)
                    idle.append(pipe)
                else:
                    getattr(listener, name)(*values)
    except (EOFError, ConnectionError) as error:
        raise _died() from error
    finally:
        pool.close()
        for process in pool.started():
            remove_partials(job.workspace.folder, suffix=partial_suffix(process.pid))


class _Reports(Listener):
    """Tells the parent, in a worker."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent

    def block(self, *values: Any) -> None:
        self._parent.send(("block", *values))

    def task(self, *values: Any) -> None:
        self._parent.send(("task", *values))

    def note(self, *values: Any) -> None:
        self._parent.send(("note", *values))


def _do_tasks(parent: Connection, job: BuildJob, workers: int) -> None:
    """Do the tasks of the shards that come through the pipe, in a worker."""
    encoder = None
    try:
        reports = _Reports(parent)
        while True:
            shard = parent.recv()
            encoder = encoder or Encoder(job.options)
            items = encode_in_order(shard_items([shard], job.options), encoder, workers)
            write_tasks(job, [shard], items, encoder.dtype, reports)
            parent.send(("done",))
    except (UserError, OSError) as error:
        parent.send(("failed", error))


def encode_in_order(blocks: Iterable, encoder: Encoder, workers: int) -> Iterator:
    """Encode every `Block` of a stream, here (one worker) or on a pool; other items pass.

    Raises `UserError` when a worker dies. No worker outlives the iteration.
    """
    if workers == 1:
        yield from encode_here(blocks, encoder)
        return
    pool = _EncodingPool()
    pending: deque[tuple[Any, int]] = deque()
    waiting = 0
    try:
        pool.start(encoder.options, workers)
        for item in blocks:
            size = len(item.content) if isinstance(item, Block) else 0
            pending.append((pool.submit(item) if isinstance(item, Block) else item, size))
            waiting += size
            while len(pending) >= _BLOCKS_PER_WORKER * workers or (
                waiting > _BYTES_PER_WORKER * workers
            ):
                done, size = pending.popleft()
                waiting -= size
                yield _result(done)
        while pending:
            yield _result(pending.popleft()[0])
    finally:
        pool.close()


def _result(item: Any) -> Any:
    return item.result() if isinstance(item, Future) else item


class _Processes:
    """Processes with a pipe each.

    They share no queue and no lock, which a killed process could leave behind locked: its pipe
    closes, and who reads at the other end sees it.
    """

    def __init__(self) -> None:
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []

    def start(self, work: Callable, arguments: Sequence[tuple], *, daemon: bool) -> None:
        """A process for each tuple of arguments, which `work` gets behind its end of the pipe."""
        # Not fork: a worker would inherit the lock of the output, and hold it beyond a killed
        # parent.
        context = multiprocessing.get_context("spawn")
        # Started by the first process, it would unblock the signals.
        resource_tracker.ensure_running()
        # Ctrl-C, and Slurm's SIGTERM, reach every process; the parent answers them and ends the
        # others, which have both blocked from their first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for values in arguments:
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(work, there, *values), daemon=daemon)
                self.processes.append(process)
                process.start()
                there.close()
                self.pipes.append(here)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def kill(self) -> None:
        """End them, whatever they are at: there is nothing in them to lose."""
        for process in self.started():
            process.kill()

    def close(self) -> None:
        """As `kill`, and wait until they are gone."""
        self.kill()
        for process in self.started():
            process.join()

    def started(self) -> list[multiprocessing.process.BaseProcess]:
        """Those that run or ran: an interrupt can come between a process and its start."""
        return [process for process in self.processes if process.pid is not None]


def _work(work: Callable, parent: Connection, *arguments: Any) -> None:
    """What a process does until its parent is gone."""
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    try:
        work(parent, *arguments)
    except (EOFError, ConnectionError, MemoryError):
        os._exit(1)  # the parent is gone, or sees that this process is


def _exit_with_the_parent() -> None:
    """A worker whose parent was killed has nobody to work for."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _EncodingPool:
    """Processes that encode, and a thread for each that waits for what it hands back."""

    def __init__(self) -> None:
        self._processes = _Processes()
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def start(self, options: Options, workers: int) -> None:
        self._processes.start(_encode_blocks, workers * [(options,)], daemon=True)
        for pipe in self._processes.pipes:
            self._idle.put(pipe)
        self._threads = ThreadPoolExecutor(workers)

    def submit(self, block: Block) -> Future:
        return self._threads.submit(self._encode, block)

    def _encode(self, block: Block) -> EncodedBlock:
        worker = self._idle.get()
        try:
            worker.send(block)
            result = worker.recv()
        except (EOFError, OSError) as error:
            self._processes.kill()
            raise _died() from error
        finally:
            self._idle.put(worker)
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        self._processes.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._processes.close()


def _encode_blocks(parent: Connection, options: Options) -> None:
    """Encode what comes through the pipe, in a worker."""
    encoder = None
    while True:
        block = parent.recv()
        try:
            encoder = encoder or Encoder(options)
            result = encoder.encode(block)
        except UserError as error:
            result = error
        parent.send(result)


def _died() -> UserError:
    return UserError(
        "a worker process died, often for want of memory; what was done is kept: run the same "
        "command again, with fewer --workers"
    )


def available_cpus() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
