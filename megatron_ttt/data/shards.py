"""Where documents come from: local files and URLs, found, opened and decompressed as a stream.

A path with `://` goes to fsspec (`hf://`, `s3://`, `gs://`, `http://`, ...), every other one to the
file system. gzip is decompressed by isal where it is installed, else by Python.
"""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ttt.errors import UserError

try:
    from isal import igzip as fast_gzip
    from isal import isal_zlib

    _GZIP_ERRORS: tuple = (gzip.BadGzipFile, isal_zlib.error)
except ImportError:
    fast_gzip = gzip
    _GZIP_ERRORS = (gzip.BadGzipFile, zlib.error)

CHUNK_BYTES = 1 << 18
"""Decompressed bytes that are read, and handed to a worker, at one time."""

_ZSTD_BYTES = 512
"""Compressed bytes that are decompressed at one time: to 16 MiB at most, four bytes being 128 KiB.
A frame takes its window besides, of at most 128 MiB."""

SUFFIXES = (
    *(f".{kind}{packing}" for kind in ("json", "jsonl") for packing in ("", ".gz", ".zst")),
    ".parquet",
)


class ShardError(UserError):
    """A shard that cannot be read to its end."""


@dataclass(frozen=True)
class Shard:
    """One input file: absolute path or URL, size in bytes, and when it changed, if that is known.

    `size` is 0 and `modified` empty where a server does not tell.
    """

    url: str
    size: int = 0
    modified: str = ""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        # In an http URL a question mark begins the query, elsewhere it is a character of a name.
        path = self.url.split("?")[0] if is_http(self.url) else self.url
        return path.rsplit("/", 1)[-1]


def is_remote(path: str) -> bool:
    return "://" in path


def is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def local_shard(path: str | Path) -> Shard:
    """A file on this machine as a shard."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    return Shard(os.path.abspath(path), status.st_size, str(status.st_mtime_ns))


def find_shards(patterns: Sequence[str]) -> list[Shard]:
    """The files that match the paths, globs and URLs, each once, ordered by name, then by path.

    Raises `UserError` for a pattern without a match and for a file of an unknown kind.
    """
    shards: dict[str, Shard] = {}
    for pattern in map(str, patterns):
        if is_remote(pattern):
            matches = _find_remote(pattern)
        else:
            # A file may have the characters of a pattern in its name.
            there = os.path.exists(pattern)
            paths = [pattern] if there else glob.glob(pattern, recursive=True)
            matches = [local_shard(path) for path in paths]
        if not matches:
            raise UserError(f"no file matches {pattern!r}; check the path and the quoting")
        shards.update((shard.url, shard) for shard in matches)
    ordered = sorted(shards.values(), key=lambda shard: (shard.name, shard.url))
    for shard in ordered:
        try:
            shard.url.encode()
        except UnicodeEncodeError:
            raise UserError(f"{shard.url!r} is no UTF-8: rename the file or its folder") from None
        if not shard.name.endswith(SUFFIXES):
            raise UserError(
                f"{shard} is no shard this reader knows; it reads {', '.join(SUFFIXES)}"
            )
    return ordered


def _find_remote(pattern: str) -> list[Shard]:
    with _remote_errors(pattern):
        files, path = fsspec_module().core.url_to_fs(pattern)
        urls = [pattern]
        wild = "*[" if is_http(pattern) else "*[?"
        if any(character in pattern for character in wild) and not files.exists(path):
            urls = [files.unstrip_protocol(match) for match in files.glob(path)]
        shards = []
        for url in urls:
            # A shard that is named and not there is an error of that shard, met when it is read.
            try:
                info = files.info(files._strip_protocol(url))
            except Exception:
                info = {}
            changes = ("ETag", "etag", "mtime", "LastModified", "last_modified", "last_commit")
            modified = next((str(info[key]) for key in changes if info.get(key)), "")
            shards.append(Shard(url, info.get("size") or 0, modified))
        return shards


def fsspec_module() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise UserError("URLs need the package fsspec: pip install fsspec") from error
    return fsspec


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Every file system has its own exceptions."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}") from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise ShardError(
            f"cannot read {url} ({reason}); check the address and the connection, then run the "
            "same command again"
        ) from error


class HashingStream(io.RawIOBase):
    """A raw stream that keeps the SHA-256 and the number of the bytes read through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._raw.read(len(buffer))
        buffer[: len(content)] = content
        self.sha256.update(content)
        self.position += len(content)
        return len(content)

    def finish(self) -> str:
        """Read what is left; the checksum of the whole."""
        while self.read(1 << 20):
            pass
        return self.sha256.hexdigest()


@contextmanager
def open_raw(shard: Shard) -> Iterator[BinaryIO]:
    """The bytes of the file as they are stored. Raises `ShardError` when they cannot be read."""
    if is_remote(shard.url):
        with _remote_errors(shard.url), fsspec_module().open(shard.url, "rb") as stream:
            yield stream
        return
    try:
        with open(shard.url, "rb") as stream:
            yield stream
    except UserError:
        raise
    except OSError as error:
        raise ShardError(f"cannot read {shard}: {error.strerror or error}") from error


def decompressed(shard: Shard, raw: HashingStream) -> Iterator[bytes]:
    """The content in chunks of about `CHUNK_BYTES`.

    Raises `ShardError` where the stream is damaged or stops before its end.
    """
    if shard.name.endswith(".gz"):
        yield from _gzip_chunks(shard, raw)
    elif shard.name.endswith(".zst"):
        yield from _zstd_chunks(shard, raw)
    else:
        yield from iter(lambda: raw.read(CHUNK_BYTES), b"")


def _gzip_chunks(shard: Shard, raw: HashingStream) -> Iterator[bytes]:
    try:
        stream = fast_gzip.open(raw, "rb")
        size = 0
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            yield chunk
        if size == 0 and raw.position == 0:
            raise EOFError
    except EOFError:
        raise ShardError(
            f"{shard} is truncated (its gzip stream has no end); fetch it again"
        ) from None
    except _GZIP_ERRORS as error:
        raise ShardError(f"{shard} is corrupt ({error}); fetch it again") from error


def _zstd_chunks(shard: Shard, raw: HashingStream) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{shard} needs the package zstandard: pip install zstandard") from error
    decompressor, frame = zstandard.ZstdDecompressor(), None
    held, size = [], 0
    try:
        while packed := raw.read(CHUNK_BYTES // 4):
            for start in range(0, len(packed), _ZSTD_BYTES):
                rest = packed[start : start + _ZSTD_BYTES]
                while rest:
                    frame = frame or decompressor.decompressobj()
                    held.append(frame.decompress(rest))
                    size += len(held[-1])
                    rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if size >= CHUNK_BYTES:
                    yield from _cut(b"".join(held))
                    held, size = [], 0
    except zstandard.ZstdError as error:
        raise ShardError(f"{shard} is corrupt ({error}); fetch it again") from error
    yield from _cut(b"".join(held))
    if frame is not None or raw.position == 0:
        raise ShardError(f"{shard} is truncated (its zstd frame has no end); fetch it again")


def _cut(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]
