"""C4 shards -> documents, streamed: shards in the order of their names, lines in order.

A shard is gzip'd or plain JSON lines; a document is the text under one or more keys of a line
(C4: `text`, beside `timestamp` and `url`). A line that holds no document is counted and reported,
and the reading goes on; a shard that cannot be read to its end is an error.
"""

import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_ttt.errors import UserError

SHARD_SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")

MalformedLine = Callable[[int, str], None]
"""What is called for a line that holds no document: line number (from 1) and reason."""


class MalformedLines:
    """Counts lines that hold no document; the first `shown` of them are printed on stderr."""

    def __init__(self, shown: int = 10) -> None:
        self.count = 0
        self.shown = shown

    def add(self, shard: Path, line_number: int, reason: str) -> None:
        self.count += 1
        if self.count <= self.shown:
            print(f"skipped {shard}:{line_number}: {reason}", file=sys.stderr)
        elif self.count == self.shown + 1:
            print("more malformed lines follow, counted but not shown", file=sys.stderr)


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that match the glob patterns, each once, ordered by file name, then by path.

    Raises `UserError` for a pattern without a match and for a file that is no JSON-lines shard.
    """
    shards: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not matches:
            raise UserError(f"no file matches {pattern!r}; check the path and the quoting")
        shards.update(matches)
    for shard in sorted(shards):
        if not shard.name.endswith(SHARD_SUFFIXES):
            raise UserError(
                f"{shard} is no shard this reader knows; it reads {', '.join(SHARD_SUFFIXES)}"
            )
    return sorted(shards, key=lambda shard: (shard.name, shard))


def read_lines(shard: Path) -> Iterator[bytes]:
    """The raw lines of one shard. Raises `UserError` when it cannot be read to its end."""
    try:
        with gzip.open(shard) if shard.suffix == ".gz" else open(shard, "rb") as stream:
            yield from stream
    except EOFError:
        raise UserError(
            f"{shard} is truncated (its gzip stream has no end); fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{shard} is corrupt ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from error


def parse_lines(
    lines: Iterable[bytes],
    json_keys: Sequence[str],
    on_malformed: MalformedLine,
    first_line_number: int = 1,
) -> Iterator[tuple[str, ...]]:
    """The texts under `json_keys` of each line. Blank lines are passed over."""
    for line_number, line in enumerate(lines, first_line_number):
        if not line.strip():
            continue
        try:
            yield _parse_line(line, json_keys)
        except (ValueError, RecursionError) as error:
            on_malformed(line_number, str(error))


def _parse_line(line: bytes, json_keys: Sequence[str]) -> tuple[str, ...]:
    document = json.loads(line)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    for key in json_keys:
        if not isinstance(document.get(key), str):
            raise ValueError(f"no string under the key {key!r}")
        # JSON's \ud800 escapes can spell half a surrogate pair, which no tokenizer can encode.
        document[key].encode()
    return tuple(document[key] for key in json_keys)


def read_documents(
    shards: Sequence[Path], malformed: MalformedLines, json_key: str = "text"
) -> Iterator[str]:
    """The documents of all shards in order; malformed lines go to `malformed`."""
    for shard in shards:

        def report(line_number: int, reason: str, shard: Path = shard) -> None:
            malformed.add(shard, line_number, reason)

        for (text,) in parse_lines(read_lines(shard), (json_key,), report):
            yield text
