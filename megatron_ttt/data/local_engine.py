"""The tasks of a run on the cores of this machine.

The parent reads, decompresses and cuts; workers parse and encode and hand back bytes, which the
parent appends in the order of the blocks: the output does not depend on their number.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from megatron_ttt.data.encoder import EncodedBlock, Encoder, Options, encode_here
from megatron_ttt.data.reader import MAX_DOCUMENT_BYTES, Block
from megatron_ttt.errors import UserError

_BLOCKS_PER_WORKER = 8
"""Blocks that wait for a worker or come from it: about 4 MB for each worker."""
_BYTES_PER_WORKER = MAX_DOCUMENT_BYTES
"""The same where documents are very long."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def encode_in_order(blocks: Iterable, encoder: Encoder, workers: int) -> Iterator:
    """Encode every `Block` of a stream, here (one worker) or on a pool; other items pass.

    Raises `UserError` when a worker dies. No worker outlives the iteration.
    """
    if workers == 1:
        yield from encode_here(blocks, encoder)
        return
    pool = _Pool()
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


class _Pool:
    """Processes that encode, a thread and a pipe of their own for each.

    They share no queue and no lock, which a killed process could leave behind locked: its pipe
    closes, the thread at the other end sees it, and all of them end.
    """

    def __init__(self) -> None:
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def start(self, options: Options, workers: int) -> None:
        # Not fork: a worker would inherit the lock of the output, and hold it beyond a killed
        # parent.
        context = multiprocessing.get_context("spawn")
        # Started by the first process, it would unblock the signals.
        resource_tracker.ensure_running()
        # Ctrl-C, and Slurm's SIGTERM, reach every process; the parent answers them and ends the
        # pool. Workers have both blocked from their first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for _ in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, options), daemon=True)
                self._processes.append(process)
                process.start()
                there.close()
                self._idle.put(here)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._threads = ThreadPoolExecutor(workers)

    def submit(self, block: Block) -> Future:
        return self._threads.submit(self._encode, block)

    def _encode(self, block: Block) -> EncodedBlock:
        worker = self._idle.get()
        try:
            worker.send(block)
            result = worker.recv()
        except (EOFError, OSError) as error:
            self._kill()
            raise UserError(
                "a worker process died, often for want of memory; what was done is kept: run the "
                "same command again, with fewer --workers"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(result, UserError):
            raise result
        return result

    def _kill(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()

    def close(self) -> None:
        """End the workers, whatever they are at: there is nothing in them to lose."""
        self._kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            if process.pid is not None:
                process.join()


def _work(parent: Connection, options: Options) -> None:
    """Encode what comes through the pipe, in a worker."""
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    encoder = None
    try:
        while True:
            block = parent.recv()
            try:
                encoder = encoder or Encoder(options)
                result = encoder.encode(block)
            except UserError as error:
                result = error
            parent.send(result)
    except (EOFError, OSError, MemoryError):
        os._exit(1)  # the parent is gone, or sees that this process is


def _exit_with_the_parent() -> None:
    """A worker whose parent was killed has nobody to work for."""
    multiprocessing.parent_process().join()
    os._exit(1)


def available_cpus() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
