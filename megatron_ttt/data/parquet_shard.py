"""The rows of a Parquet file, in memory that a file cannot inflate.

A few bytes can stand for gigabytes: a page is decompressed as a whole, and a value that stands once
in a dictionary is copied for every row. So the sizes of pages are looked up before they are
decompressed, and as few rows are read at one time as the largest page demands.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from megatron_ttt.data.shards import CHUNK_BYTES, Shard, ShardError
from megatron_ttt.errors import UserError

MAX_PAGE_BYTES = 128 << 20
"""A page that takes more, decompressed, is refused. DuckDB's, the largest, take 100 MB."""
_BATCH_BYTES = 32 << 20
_BATCH_ROWS = 128


def row_streams(
    shard: Shard, raw: BinaryIO, keys: Sequence[str], max_document: int
) -> Iterator[tuple[int, bytes]]:
    """(number of the first row, Arrow stream of the rows from there on) for the columns `keys`.

    A stream has about `CHUNK_BYTES`; it is empty for a row with more than `max_document` bytes.
    Raises `ShardError` for a file that cannot be read.
    """
    pyarrow, first_row = _pyarrow(shard), 1
    try:
        raw.seek(0)
        file = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES)
        columns = [_column(shard, file, key) for key in keys]
        for group in range(file.num_row_groups):
            chunks = [file.metadata.row_group(group).column(column) for column in columns]
            largest = max(_largest_page(shard, raw, chunk) for chunk in chunks)
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=list(keys)):
                for count, content in _cut(pyarrow, batch, max_document):
                    yield first_row, content
                    first_row += count
    except (OSError, pyarrow.ArrowException, LookupError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not Arrow's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ShardError(f"{shard} is corrupt ({reason}); fetch it again") from error


def stream_rows(content: bytes, keys: Sequence[str]) -> list[dict]:
    """The rows of a stream. A string that is no UTF-8 is None."""
    with _pyarrow("a Parquet shard").ipc.open_stream(content) as reader:
        table = reader.read_all()
    # A string column is checked for UTF-8 when it is read, value by value.
    columns = [[_value(value) for value in table.column(key)] for key in keys]
    return [dict(zip(keys, row)) for row in zip(*columns)]


def _pyarrow(shard: Shard | str) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{shard} needs the package pyarrow: pip install pyarrow") from error
    return pyarrow


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _column(shard: Shard, file: Any, key: str) -> int:
    """The number of a column among those that are stored."""
    stored = [file.schema.column(index).path for index in range(len(file.schema))]
    if max(stored.count(key), file.schema_arrow.names.count(key)) > 1:
        raise ShardError(f"{shard} has two columns {key!r}; rename one of them")
    if key not in stored or key not in file.schema_arrow.names:
        raise ShardError(f"{shard} has no column {key!r} of plain values; check --json-keys")
    return stored.index(key)


def _cut(pyarrow: Any, batch: Any, max_document: int) -> Iterator[tuple[int, bytes]]:
    """(number of rows, Arrow stream of them) for the rows of a batch."""
    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    batch = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
    sizes = [sum(row) for row in zip(*(_sizes(pyarrow, column) for column in columns))]
    start = 0
    while start < len(sizes):
        end, size = start + 1, sizes[start]
        if size > max_document:
            yield 1, b""
            start = end
            continue
        while end < len(sizes) and size + sizes[end] <= CHUNK_BYTES:
            size += sizes[end]
            end += 1
        content = io.BytesIO()
        with pyarrow.ipc.new_stream(content, batch.schema) as writer:
            writer.write_batch(batch.slice(start, end - start))
        yield end - start, content.getvalue()
        start = end


def _sizes(pyarrow: Any, column: Any) -> list[int]:
    """The bytes of each value; 0 for what is no text."""
    if column.type == pyarrow.string_view():
        column = column.cast(pyarrow.large_string())
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    if column.type not in kinds:
        return [0] * len(column)
    return pyarrow.compute.binary_length(column).fill_null(0).to_pylist()


def _largest_page(shard: Shard, raw: BinaryIO, chunk: Any) -> int:
    """The bytes that the largest page of a column chunk takes, decompressed.

    This is the size that the reader would trust too, unlike the sizes in the file's footer.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    place, largest = start, 0
    while place < start + chunk.total_compressed_size:
        length, (decompressed, compressed) = _page_header(raw, place)
        if decompressed > MAX_PAGE_BYTES:
            raise ShardError(
                f"{shard} has a page of {decompressed} bytes, decompressed; write it anew with "
                f"pages of at most {MAX_PAGE_BYTES}"
            )
        largest = max(largest, decompressed)
        place += length + compressed
    return largest


def _page_header(raw: BinaryIO, place: int) -> tuple[int, tuple[int, int]]:
    """Bytes of a page's header, and of its content: decompressed, and as it is stored."""
    size = 1 << 10
    while True:
        raw.seek(place)
        content = raw.read(size)
        header = _Thrift(content)
        try:
            fields = header.struct()
        except IndexError:
            if len(content) < size or size >= 1 << 24:
                raise
            size <<= 4
            continue
        sizes = fields[2], fields[3]
        if min(sizes) < 0:
            raise ValueError("a page of a negative size")
        return header.place, sizes


class _Thrift:
    """As much of Thrift's compact protocol as it takes to find the end of a struct."""

    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def struct(self) -> dict[int, Any]:
        """The integers of a struct by their field's number; None for all else."""
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> int | None:
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 3:
            self._byte()
        elif kind == 7:
            self.place += 8
        elif kind == 8:
            length = self._varint()
            self.place += length
        elif kind in (9, 10):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                # A boolean has its value in its kind, in a struct, and in a byte, in a list.
                self._value(3 if head & 15 in (1, 2) else head & 15)
        elif kind == 12:
            self.struct()
        elif kind not in (1, 2):
            raise ValueError("a page without a header")
        return None

    def _integer(self) -> int:
        number = self._varint() & 0xFFFFFFFF
        return (number >> 1) ^ -(number & 1)

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7

    def _byte(self) -> int:
        self.place += 1
        return self._content[self.place - 1]
