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
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_ttt.data.encoder import EncodedBlock, Encoder, Options, encode_here
from megatron_ttt.data.reader import Block
from megatron_ttt.errors import UserError

_BLOCKS_PER_WORKER = 8
"""Blocks that wait for a worker or come from it: about 4 MB for each worker."""


def encode_in_order(blocks: Iterable, encoder: Encoder, workers: int) -> Iterator:
    """Encode every `Block` of a stream, here (one worker) or on a pool; other items pass."""
    if workers == 1:
        yield from encode_here(blocks, encoder)
        return
    # Not fork: a worker would inherit the lock of the output, and hold it beyond a killed parent.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder.options,))
    pending: deque[Any] = deque()
    try:
        for item in blocks:
            if isinstance(item, Block):
                item = pool.submit(_encode_in_worker, item)
            pending.append(item)
            if len(pending) >= _BLOCKS_PER_WORKER * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, often for want of memory; what was done is kept: run the same "
            "command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(item: Any) -> Any:
    return item.result() if isinstance(item, Future) else item


def _start_worker(options: Options) -> None:
    global _worker_encoder
    # Ctrl-C, and Slurm's SIGTERM, reach every process: the parent answers them and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    _worker_encoder = Encoder(options)


def _exit_with_the_parent() -> None:
    """A pool whose parent was killed would wait for its next block forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(block: Block) -> EncodedBlock:
    return _worker_encoder.encode(block)


def available_cpus() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
