"""Documents -> token ids -> `.bin`/`.idx`, on several processes.

The parent reads raw lines and deals them out in batches; workers parse, encode and hand back bytes,
which the parent appends in the order of the batches: the output does not depend on their number.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ttt.data import indexed
from megatron_ttt.data.partial_file import refuse_existing
from megatron_ttt.data.reader import MalformedLines, find_shards, parse_lines, read_lines
from megatron_ttt.data.tokenizer import SentencePieceTokenizer
from megatron_ttt.errors import UserError

_BATCH_BYTES = 1 << 18
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Batch:
    """Consecutive raw lines of one shard."""

    shard: Path
    first_line_number: int
    lines: list[bytes]


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a batch; `columns` has one (tokens, lengths int32 [documents]) per key."""

    shard: Path
    columns: list[tuple[bytes, np.ndarray]]
    documents: int
    text_bytes: int
    malformed: list[tuple[int, str]]


@dataclass(frozen=True)
class Summary:
    """What a run of `preprocess` read and wrote; `tokens` has one entry per JSON key."""

    documents: int
    tokens: dict[str, int]
    text_bytes: int
    malformed_lines: int
    seconds: float


@dataclass(frozen=True)
class Encoder:
    """How a document becomes token ids: ids, BOS before and EOS after unless it has no tokens."""

    tokenizer: SentencePieceTokenizer
    json_keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool

    def encode(self, batch: Batch) -> EncodedBatch:
        dtype = indexed.token_dtype(self.tokenizer.vocab_size)
        columns: list[list[bytes]] = [[] for _ in self.json_keys]
        text_bytes = 0
        malformed: list[tuple[int, str]] = []

        def report(line_number: int, reason: str) -> None:
            malformed.append((line_number, reason))

        for texts in parse_lines(batch.lines, self.json_keys, report, batch.first_line_number):
            for column, text in zip(columns, texts):
                text_bytes += len(text.encode())
                column.append(np.array(self._encode_text(text), dtype).tobytes())
        return EncodedBatch(
            shard=batch.shard,
            columns=[
                (b"".join(column), np.array([len(d) // dtype.itemsize for d in column], np.int32))
                for column in columns
            ],
            documents=len(columns[0]),
            text_bytes=text_bytes,
            malformed=malformed,
        )

    def _encode_text(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if ids and self.prepend_bos:
            ids.insert(0, self.tokenizer.bos_id)
        if ids and self.append_eod:
            ids.append(self.tokenizer.eos_id)
        return ids


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_model: str | Path,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    prepend_bos: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Tokenize the shards that match `inputs` into `PREFIX_KEY_document.{bin,idx}` for each key.

    The files are byte for byte those of Megatron-LM's `tools/preprocess_data.py`. Nothing stands
    under their names before all of it is written. Raises `UserError` for unreadable input,
    existing output, input without a token, and a model without the piece an option needs.
    """
    prefixes = {key: f"{output_prefix}_{key}_document" for key in json_keys}
    outputs = [path(p) for p in prefixes.values() for path in (indexed.bin_path, indexed.idx_path)]
    refuse_existing(outputs, overwrite)
    shards = find_shards(inputs)
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    if append_eod and tokenizer.eos_id < 0:
        raise UserError(f"{tokenizer_model} has no EOS piece; leave --append-eod out")
    if prepend_bos and tokenizer.bos_id < 0:
        raise UserError(f"{tokenizer_model} has no BOS piece; leave --prepend-bos out")
    encoder = Encoder(tokenizer, tuple(json_keys), append_eod, prepend_bos)

    dtype = indexed.token_dtype(tokenizer.vocab_size)
    malformed = MalformedLines()
    progress = _Progress()
    writers: dict[str, indexed.IndexedWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = indexed.IndexedWriter(prefix, dtype)
        for batch in _encode_in_order(_batches(shards), encoder, workers):
            for writer, (tokens, lengths) in zip(writers.values(), batch.columns):
                writer.append(tokens, lengths)
            for line_number, reason in batch.malformed:
                malformed.add(batch.shard, line_number, reason)
            progress.add(batch, sum(writer.tokens for writer in writers.values()))
        for key, writer in writers.items():
            if writer.tokens == 0:
                raise UserError(
                    f"no tokens under the key {key!r} in {', '.join(inputs)} "
                    f"({malformed.count} malformed lines); check --input and --json-keys"
                )
        for writer in writers.values():
            writer.publish()
    except OSError as error:
        raise UserError(f"cannot write {output_prefix}: {error.strerror or error}") from error
    finally:
        for writer in writers.values():
            writer.discard()
    progress.print()
    if malformed.count:
        print(f"skipped {malformed.count} malformed lines", file=sys.stderr)
    return Summary(
        documents=progress.documents,
        tokens={key: writer.tokens for key, writer in writers.items()},
        text_bytes=progress.text_bytes,
        malformed_lines=malformed.count,
        seconds=time.perf_counter() - progress.start,
    )


def _batches(shards: Iterable[Path]) -> Iterator[Batch]:
    for shard in shards:
        first, lines, size = 1, [], 0
        for line in read_lines(shard):
            lines.append(line)
            size += len(line)
            if size >= _BATCH_BYTES:
                yield Batch(shard, first, lines)
                first, lines, size = first + len(lines), [], 0
        yield Batch(shard, first, lines)


def _encode_in_order(
    batches: Iterable[Batch], encoder: Encoder, workers: int
) -> Iterator[EncodedBatch]:
    """Encode in this process (one worker) or on a pool that holds a bounded number of batches."""
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (encoder.tokenizer.model_path, encoder.json_keys, encoder.append_eod, encoder.prepend_bos),
    )
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, often for want of memory; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(model_path: Path, *options) -> None:
    global _worker_encoder
    # Ctrl-C reaches the whole process group: the parent answers it, and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    _worker_encoder = Encoder(SentencePieceTokenizer(model_path), *options)


def _exit_with_the_parent() -> None:
    """A pool whose parent was killed would wait for its next batch forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    return _worker_encoder.encode(batch)


class _Progress:
    """Counts what is done and prints it on stderr every few seconds."""

    def __init__(self) -> None:
        self.start = self._printed = time.perf_counter()
        self.documents = self.text_bytes = self.tokens = 0

    def add(self, batch: EncodedBatch, tokens: int) -> None:
        self.documents += batch.documents
        self.text_bytes += batch.text_bytes
        self.tokens = tokens
        if time.perf_counter() - self._printed >= _PROGRESS_SECONDS:
            self.print()

    def print(self) -> None:
        self._printed = time.perf_counter()
        seconds = self._printed - self.start
        megabytes = self.text_bytes / 1e6
        print(
            f"{self.documents:,} documents ({self.documents / seconds:,.0f}/s), "
            f"{megabytes:,.1f} MB of text ({megabytes / seconds:.2f} MB/s), "
            f"{self.tokens:,} tokens, {seconds:.1f} s",
            file=sys.stderr,
        )


def available_cpus() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
