"""Megatron's `.bin`/`.idx` pair, written and checked without importing megatron or torch.

`PREFIX.bin` holds the token ids of all documents one after the other. `PREFIX.idx` holds, all
little-endian: the magic `MMIDIDX\\0\\0`, version 1 (u64), dtype code (u8), sequences S (u64),
documents + 1 = D (u64), sequence lengths (int32 [S]), byte offsets of the sequences in the .bin
(int64 [S]), and for each document the sequence it starts at, then S (int64 [D]).
"""

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ttt.data.atomic_file import PartialFile
from megatron_ttt.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
CHUNK_DOCUMENTS = 1 << 18
"""Documents of an index that are in memory at one time."""
_REMEDY = "run the preprocessing again"
_DTYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while the vocabulary has fewer than 65,500 pieces, else int32: Megatron's rule."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexWriter:
    """Writes an .idx, document by document, under a partial name until `publish`.

    Memory does not grow with the documents: their lengths wait in a nameless file on the disk.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.tokens = self.documents = 0
        self._dtype = dtype
        self._finished = False
        self._idx = PartialFile(idx_path(prefix))
        self._lengths = tempfile.TemporaryFile(dir=self._idx.path.parent)  # noqa: SIM115

    def append(self, lengths: np.ndarray) -> None:
        """Add documents by their lengths [documents]."""
        self._lengths.write(np.ascontiguousarray(lengths, "<i4").data)
        self.tokens += int(np.sum(lengths, dtype=np.int64))
        self.documents += len(lengths)

    def finish(self) -> dict[str, int | str]:
        """Bring the index to the disk, still under its partial name; its size and SHA-256."""
        if not self._finished:
            self._write_index()
            self._idx.flush()
            self._finished = True
        size = _HEADER.size + 12 * self._sequences + 8 * (self.documents + 1)
        return {"size": size, "sha256": self._idx.sha256.hexdigest()}

    def publish(self, publish_bin: Callable[[], None]) -> None:
        """Give the .bin its name and then the .idx, which makes the pair whole.

        Replacing an older pair takes its .idx away first, so that a crash in between leaves no
        .idx that belongs to another .bin.
        """
        self.finish()
        self._idx.path.unlink(missing_ok=True)
        publish_bin()
        self._idx.publish()

    def discard(self) -> None:
        """Remove what `publish` has not given a name."""
        self._idx.discard()
        with suppress(OSError):  # a full disk once more, while the buffer is flushed
            self._lengths.close()

    def _length_chunks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(4 * CHUNK_DOCUMENTS):
            yield np.frombuffer(chunk, "<i4")

    def _write_index(self) -> None:
        # As in Megatron's tool, a document without tokens has no sequence but keeps its entry.
        self._sequences = sum(int(np.count_nonzero(chunk)) for chunk in self._length_chunks())
        code = next(c for c, name in _DTYPE_CODES.items() if np.dtype(name) == self._dtype)
        write = self._idx.write
        write(_HEADER.pack(_MAGIC, 1, code, self._sequences, self.documents + 1))
        for lengths in self._length_chunks():
            write(lengths[lengths > 0].tobytes())
        offset = 0
        for lengths in self._length_chunks():
            ends = offset + np.cumsum(lengths[lengths > 0], dtype="<i8") * self._dtype.itemsize
            write(np.concatenate([[offset], ends])[:-1].astype("<i8").tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        first = 0
        write(np.zeros(1, "<i8").tobytes())
        for lengths in self._length_chunks():
            firsts = first + np.cumsum(lengths > 0, dtype="<i8")
            write(firsts.tobytes())
            first = int(firsts[-1])


class IndexedWriter:
    """Writes a pair, document by document, under partial names until `publish`."""

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self._bin = PartialFile(bin_path(prefix))
        self._index = IndexWriter(prefix, dtype)
        self._size = 0

    @property
    def documents(self) -> int:
        return self._index.documents

    @property
    def tokens(self) -> int:
        return self._index.tokens

    def append(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Add documents: their tokens in the pair's dtype, their lengths as int32 [documents]."""
        self._bin.write(tokens)
        self._size += len(tokens)
        self._index.append(lengths)

    def finish(self) -> dict[str, dict]:
        """Write the index and bring both files to the disk, still under partial names.

        Returns the size in bytes and the SHA-256 of the two, under "bin" and "idx".
        """
        idx = self._index.finish()
        self._bin.flush()
        return {"bin": {"size": self._size, "sha256": self._bin.sha256.hexdigest()}, "idx": idx}

    def publish(self) -> None:
        """Give both files their names."""
        self.finish()
        self._index.publish(self._bin.publish)

    def discard(self) -> None:
        """Remove what `publish` has not given a name."""
        self._bin.discard()
        self._index.discard()


@dataclass(frozen=True)
class IndexedInfo:
    """What a sound pair says about itself."""

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int


class Index:
    """An .idx file, mapped: `lengths` int32 [sequences], `offsets` in bytes int64 [sequences],
    `documents` int64 [documents + 1].

    Raises `UserError` for a missing, truncated or foreign file; the entries are not scanned.
    """

    def __init__(self, prefix: str | Path) -> None:
        path = idx_path(prefix)
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as stream:
                header = stream.read(_HEADER.size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if header[: len(_MAGIC)] != _MAGIC:
            raise UserError(f"{path} is not a Megatron index (bad magic); {_REMEDY}")
        if len(header) < _HEADER.size:
            raise UserError(f"{path} is truncated inside its header; {_REMEDY}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPE_CODES:
            raise UserError(f"{path} has version {version}, dtype code {code}: unknown; {_REMEDY}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size != expected:
            raise UserError(f"{path} has {size} bytes where its header says {expected}; {_REMEDY}")
        self.dtype = np.dtype(_DTYPE_CODES[code])
        content = np.asarray(np.memmap(path, np.uint8, "r"))[_HEADER.size :]
        self.lengths = content[: 4 * sequences].view("<i4")
        self.offsets = content[4 * sequences : 12 * sequences].view("<i8")
        self.documents = content[12 * sequences :].view("<i8")

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, by the last one's place."""
        return int(self.offsets[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def tokens_per_document(self) -> Iterator[np.ndarray]:
        """The number of tokens of each document, in chunks, int64; 0 for an empty one."""
        for start in range(0, len(self.documents) - 1, CHUNK_DOCUMENTS):
            bounds = np.array(self.documents[start : start + CHUNK_DOCUMENTS + 1])
            sequences = np.array(self.lengths[bounds[0] : bounds[-1]])
            ends = np.concatenate([[0], np.cumsum(sequences, dtype=np.int64)])
            yield np.diff(ends[bounds - bounds[0]])


def open_indexed(prefix: str | Path) -> Index:
    """The index of a pair whose two files are there and fit each other by their sizes.

    Its entries are not scanned, so it takes no time. Raises `UserError` for a missing, truncated or
    foreign file, for files that do not belong together, and for a pair without a token.
    """
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise UserError(
                f"{path} not found; a dataset is named by its prefix, without .bin and .idx, "
                "and made by tools/preprocess_c4.py"
            )
    index = Index(prefix)
    if len(index.lengths) == 0 or len(index.documents) == 0:
        raise UserError(f"{prefix} holds no tokens; {_REMEDY}")
    size, expected = os.path.getsize(bin_), index.tokens * index.dtype.itemsize
    if size != expected:
        raise UserError(f"{bin_} has {size} bytes where its .idx says {expected}; {_REMEDY}")
    if expected == 0:
        raise UserError(f"{prefix} holds no tokens; {_REMEDY}")
    return index


def check_indexed(prefix: str | Path) -> IndexedInfo:
    """Open a pair as `open_indexed` does and scan its index; token ids are not scanned.

    Raises `UserError` too for an index that contradicts itself: a negative length, sequences that
    do not follow each other in the .bin, documents that do not follow each other.
    """
    index = open_indexed(prefix)
    fault = _fault(index)
    if fault is not None:
        raise UserError(f"{idx_path(prefix)} is corrupt ({fault}); {_REMEDY}")
    return IndexedInfo(index.dtype, len(index.lengths), len(index.documents) - 1, index.tokens)


def _fault(index: Index) -> str | None:
    """What is wrong with the entries of an index, the first thing found."""
    offset = 0
    for start in range(0, len(index.lengths), CHUNK_DOCUMENTS):
        lengths = index.lengths[start : start + CHUNK_DOCUMENTS]
        if lengths.min() < 0:
            worst = int(lengths.argmin())
            return f"sequence {start + worst} has {lengths[worst]} tokens"
        ends = offset + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        wrong = index.offsets[start : start + CHUNK_DOCUMENTS] != np.append(offset, ends[:-1])
        if wrong.any():
            return f"a gap before sequence {start + int(wrong.argmax())}"
        offset = int(ends[-1])
    if index.documents[0] != 0:
        return "its documents do not begin with its sequences"
    if index.documents[-1] != len(index.lengths):
        return "its documents do not end with its sequences"
    for start in range(0, len(index.documents) - 1, CHUNK_DOCUMENTS):
        back = np.diff(index.documents[start : start + CHUNK_DOCUMENTS + 1]) < 0
        if back.any():
            return f"document {start + int(back.argmax())} ends before it begins"
    return None


def check_ids(prefix: str | Path, ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids of a pair that are outside the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(
            f"{bin_path(prefix)} holds token ids outside 0..{vocab_size - 1}; it was made with "
            "another tokenizer: run the preprocessing again"
        )
