"""Megatron's `.bin`/`.idx` pair, written and checked without importing megatron or torch.

`PREFIX.bin` holds the token ids of all documents one after the other. `PREFIX.idx` holds, all
little-endian: the magic `MMIDIDX\\0\\0`, version 1 (u64), dtype code (u8), sequences S (u64),
documents + 1 = D (u64), sequence lengths (int32 [S]), byte offsets of the sequences in the .bin
(int64 [S]), and for each document the sequence it starts at, then S (int64 [D]).
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ttt.data.partial_file import PartialFile
from megatron_ttt.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while the vocabulary has fewer than 65,500 pieces, else int32: Megatron's rule."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes a pair, document by document, under partial names until `publish`."""

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.tokens = 0
        self._dtype = dtype
        self._lengths: list[np.ndarray] = []
        self._bin = PartialFile(bin_path(prefix))
        self._idx = PartialFile(idx_path(prefix))

    def append(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Add documents: their tokens in the pair's dtype, their lengths as int32 [documents]."""
        self._bin.stream.write(tokens)
        self._lengths.append(lengths)
        self.tokens += len(tokens) // self._dtype.itemsize

    def publish(self) -> None:
        """Write the index and give both files their names, the .idx last: it makes the pair whole.

        Replacing an older pair takes its .idx away first, so that a crash in between leaves no
        .idx that belongs to another .bin.
        """
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        # As in Megatron's tool, a document without tokens has no sequence but keeps its entry.
        documents = np.concatenate([[0], np.cumsum(lengths > 0)])
        lengths = lengths[lengths > 0]
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        code = next(c for c, name in _DTYPE_CODES.items() if np.dtype(name) == self._dtype)
        self._idx.stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(documents)))
        self._idx.stream.write(lengths.astype("<i4").tobytes())
        self._idx.stream.write((offsets * self._dtype.itemsize).astype("<i8").tobytes())
        self._idx.stream.write(documents.astype("<i8").tobytes())
        self._bin.flush()
        self._idx.flush()
        self._idx.path.unlink(missing_ok=True)
        self._bin.publish()
        self._idx.publish()

    def discard(self) -> None:
        """Remove what `publish` has not given a name."""
        self._bin.discard()
        self._idx.discard()


@dataclass(frozen=True)
class IndexedInfo:
    """What a sound pair says about itself."""

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int


def check_indexed(prefix: str | Path) -> IndexedInfo:
    """Open a pair and compare its two files with each other; token ids are not scanned.

    Raises `UserError` for a missing, truncated or foreign file, for files that do not belong
    together, and for a pair without a token.
    """
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise UserError(
                f"{path} not found; a dataset is named by its prefix, without .bin and .idx, "
                "and made by tools/preprocess_c4.py"
            )
    remedy = "run the preprocessing again"
    try:
        idx_size, bin_size = os.path.getsize(idx), os.path.getsize(bin_)
        with open(idx, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if header[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{idx} is not a Megatron index (bad magic); {remedy}")
    if len(header) < _HEADER.size:
        raise UserError(f"{idx} is truncated inside its header; {remedy}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPE_CODES:
        raise UserError(f"{idx} has version {version}, dtype code {code}: unknown; {remedy}")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if idx_size != expected:
        raise UserError(f"{idx} has {idx_size} bytes where its header says {expected}; {remedy}")
    dtype = np.dtype(_DTYPE_CODES[code])
    if sequences == 0 or documents == 0:
        raise UserError(f"{prefix} holds no tokens; {remedy}")
    index = np.memmap(idx, np.uint8, "r")
    last_length = index[_HEADER.size + 4 * (sequences - 1) :][:4].view("<i4")[0]
    last_offset = index[_HEADER.size + 12 * sequences - 8 :][:8].view("<i8")[0]
    if index[-8:].view("<i8")[0] != sequences:
        raise UserError(f"{idx} is corrupt (its documents do not end with its sequences); {remedy}")
    expected = int(last_offset) + int(last_length) * dtype.itemsize
    if bin_size != expected:
        raise UserError(f"{bin_} has {bin_size} bytes where its .idx says {expected}; {remedy}")
    return IndexedInfo(dtype, sequences, documents - 1, bin_size // dtype.itemsize)
