"""C4 shards -> blocks of raw lines -> documents, streamed, lines in order.

A shard is JSON lines, gzip'd, zstd'd or plain, or Parquet; a document is the text under one or more
keys of a line or a row (C4: `text`, beside `timestamp` and `url`). Reading cuts a shard into blocks
without looking into the lines; parsing a block is another step, for another process.
"""

import errno
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_ttt.data.parquet_shard import row_streams, stream_rows
from megatron_ttt.data.shards import (
    CHUNK_BYTES,
    HashingStream,
    Shard,
    ShardError,
    decompressed,
    is_remote,
    local_shard,
    open_raw,
)

try:
    import orjson
except ImportError:
    orjson = None

MAX_DOCUMENT_BYTES = 16 << 20
"""A longer line (or row) is an error. Encoding takes up to fifty times its bytes in memory."""

MalformedLine = Callable[[int, str], None]
"""What is called for a line that holds no document: line number (from 1) and reason."""


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one shard, as they are stored; `table` marks an Arrow stream of rows.

    `position` is where in the stored file the reading stood behind them. `fault` stands in place of
    a line that was too long to be kept.
    """

    first_line: int
    content: bytes
    position: int
    table: bool = False
    fault: str = ""


@dataclass(frozen=True)
class ShardRead:
    """A shard was read to its end: the size and the SHA-256 of the file as it is stored."""

    size: int
    sha256: str


class MalformedLines:
    """Counts lines that hold no document; the first `shown` of them are printed on stderr."""

    def __init__(self, shown: int = 10) -> None:
        self.count = 0
        self.shown = shown

    def add(self, shard: Shard | Path, line_number: int, reason: str) -> None:
        self.count += 1
        if self.count <= self.shown:
            print(f"skipped {shard}:{line_number}: {reason}", file=sys.stderr)
        elif self.count == self.shown + 1:
            print("more malformed lines follow, counted but not shown", file=sys.stderr)


def read_blocks(
    shard: Shard, json_keys: Sequence[str] = ("text",), max_document: int = MAX_DOCUMENT_BYTES
) -> Iterator[Block | ShardRead]:
    """The blocks of one shard, then one `ShardRead`.

    Raises `ShardError` when the shard cannot be read to its end.
    """
    with open_raw(shard) as raw:
        stream = HashingStream(raw)
        if shard.name.endswith(".parquet"):
            # Parquet is read from its end: one pass for the checksum, another for the rows.
            with _seekable(shard, raw, stream) as file:
                whole = ShardRead(sha256=stream.finish(), size=stream.position)
                yield from _table_blocks(shard, file, json_keys, whole.size, max_document)
        else:
            yield from _line_blocks(decompressed(shard, stream), stream, max_document)
            whole = ShardRead(sha256=stream.finish(), size=stream.position)
    yield whole


@contextmanager
def _seekable(shard: Shard, raw: BinaryIO, stream: HashingStream) -> Iterator[BinaryIO]:
    """The file itself, or a copy of what comes through the network: once, and forwards."""
    if not is_remote(shard.url):
        yield raw
        return
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(stream, copy, CHUNK_BYTES)
            copy.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ShardError(
                f"no room for a copy of {shard} in {tempfile.gettempdir()} ({error.strerror}); "
                "make room, or set TMPDIR to another folder"
            ) from error
        yield copy


def _line_blocks(
    chunks: Iterator[bytes], stream: HashingStream, max_document: int
) -> Iterator[Block]:
    """Cut chunks behind their last line break; a line over the limit is dropped as it comes in."""
    first_line, held, held_bytes, dropping = 1, [], 0, False
    for chunk in chunks:
        if dropping:
            end = chunk.find(b"\n") + 1
            if not end:
                continue
            yield Block(first_line, b"", stream.position, fault=_too_long(max_document))
            first_line, dropping, chunk = first_line + 1, False, chunk[end:]
        end = chunk.rfind(b"\n") + 1
        if end:
            content = b"".join([*held, chunk[:end]])
            yield Block(first_line, content, stream.position)
            first_line, held, held_bytes = first_line + content.count(b"\n"), [], 0
        if end < len(chunk):
            held.append(chunk[end:])
            held_bytes += len(held[-1])
        if held_bytes > max_document:
            held, held_bytes, dropping = [], 0, True
    if dropping:
        yield Block(first_line, b"", stream.position, fault=_too_long(max_document))
    elif held:
        yield Block(first_line, b"".join(held), stream.position)


def _too_long(max_document: int, what: str = "line") -> str:
    return f"the {what} is longer than {max_document} bytes (--max-document-bytes)"


def _table_blocks(
    shard: Shard, raw: BinaryIO, json_keys: Sequence[str], position: int, max_document: int
) -> Iterator[Block]:
    for row, content in row_streams(shard, raw, json_keys, max_document):
        fault = "" if content else _too_long(max_document, "row")
        yield Block(row, content, position, table=True, fault=fault)


def parse_block(
    block: Block,
    json_keys: Sequence[str],
    on_malformed: MalformedLine,
    max_document: int = MAX_DOCUMENT_BYTES,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and texts under `json_keys` of each line. Blank lines are passed over."""
    if block.fault:
        on_malformed(block.first_line, block.fault)
        return
    content = block.content
    rows = stream_rows(content, json_keys) if block.table else content.split(b"\n")
    for line_number, row in enumerate(rows, block.first_line):
        if not block.table and (not row or row.isspace()):
            continue
        try:
            if not block.table and len(row) > max_document:
                raise ValueError(_too_long(max_document))
            document = row if block.table else _parse_line(row)
            texts = tuple(document.get(key) for key in json_keys)
            for key, text in zip(json_keys, texts):
                if not isinstance(text, str):
                    raise ValueError(f"no string under the key {key!r}")
                if not text.isascii():
                    # JSON's \ud800 can spell half a surrogate pair, which no tokenizer encodes.
                    text.encode()
        except (ValueError, RecursionError) as error:
            on_malformed(line_number, str(error))
        else:
            yield line_number, texts


def _parse_line(line: bytes) -> dict:
    if orjson is not None:
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError:
            # Python's parser decides what is JSON, with orjson installed and without.
            document = json.loads(line.decode("utf-8-sig"))
    else:
        # Bytes it would take for UTF-16 where they look like it.
        document = json.loads(line.decode("utf-8-sig"))
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def read_documents(
    shards: Sequence[Shard | Path], malformed: MalformedLines, json_key: str = "text"
) -> Iterator[str]:
    """The documents of all shards in order; malformed lines go to `malformed`."""
    for path in shards:
        shard = path if isinstance(path, Shard) else local_shard(path)

        def report(line_number: int, reason: str, shard: Shard = shard) -> None:
            malformed.add(shard, line_number, reason)

        for block in read_blocks(shard, (json_key,)):
            if isinstance(block, Block):
                for _, (text,) in parse_block(block, (json_key,), report):
                    yield text
