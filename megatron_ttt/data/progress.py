"""How a run is going, on stderr and in a log file."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from megatron_ttt.data.shard_jobs import Counts, Listener
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

_SECONDS = 5.0
_NOTES_SHOWN = 10


class Progress(Listener):
    """Counts what this run does and says so every few seconds, on one line of a terminal.

    `shards` are those that are to do. Notes beyond the first ten go to the log file only.
    """

    def __init__(self, log: Path, shards: Sequence[Shard]) -> None:
        self.start = self._printed = time.perf_counter()
        self._finished = Counts()
        self._current: dict[str, tuple[Counts, int]] = {}  # by shard: so far, and its position
        self._shards, self._bytes = len(shards), sum(shard.size for shard in shards)
        self._finished_shards = self._finished_bytes = 0
        self._notes = 0
        self._width = 0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log, "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from error

    def block(self, shard: Shard, counts: Counts, position: int) -> None:
        before, _ = self._current.get(shard.url, (Counts(), 0))
        before.add(counts)
        self._current[shard.url] = before, position
        self._print_now_and_then()

    def task(self, shard: Shard, manifest: dict) -> None:
        # The manifest counts what its blocks counted, or, of a shard that was skipped, nothing.
        self._finished.add_manifest(manifest)
        self._finished_shards += 1
        self._finished_bytes += shard.size
        self._current.pop(shard.url, None)
        documents, malformed = manifest["documents"], manifest["malformed"]
        outcome = "skipped" if manifest["skipped"] else "done"
        self.log(f"{shard}: {outcome}, {documents} documents, {malformed} malformed lines")
        self._print_now_and_then()

    def note(self, message: str) -> None:
        self._notes += 1
        if self._notes <= _NOTES_SHOWN:
            self._write_stderr(message)
        elif self._notes == _NOTES_SHOWN + 1:
            self._write_stderr("more is skipped: it is counted here and listed in the log")
        self.log(message)

    def log(self, line: str) -> None:
        """Write a line to the log file alone."""
        self._log.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def print(self) -> None:
        """Say how far it is, now."""
        self._printed = time.perf_counter()
        line, short = self._lines()
        self.log(line)
        if sys.stderr.isatty():
            # A line that is longer than the terminal is wide could not be written over.
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            short = short[: width - 1]
            print(f"\r{short:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(short)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Say what became of it, if anything did."""
        if self._finished_shards or self._current:
            line, _ = self._lines()
            self.log(line)
            self._write_stderr(line)
        self._log.close()

    def _print_now_and_then(self) -> None:
        if time.perf_counter() - self._printed >= _SECONDS:
            self.print()

    def _lines(self) -> tuple[str, str]:
        """All there is to say, and what fits a terminal."""
        seconds = time.perf_counter() - self.start
        counts = replace(self._finished)
        for current, _ in self._current.values():
            counts.add(current)
        megabytes = counts.text_bytes / 1e6
        documents, text, tokens = (
            count / seconds for count in (counts.documents, megabytes, counts.tokens)
        )
        shards, time_left = f"{self._finished_shards} of {self._shards} shards", self._time_left()
        full = (
            f"{counts.documents:,} documents ({documents:,.0f}/s), "
            f"{megabytes:,.1f} MB of text ({text:.2f} MB/s), "
            f"{counts.tokens:,} tokens ({tokens:,.0f}/s), {shards}, "
            f"{counts.empty} empty, {counts.malformed} malformed, "
            f"{counts.skipped_shards} shards skipped, "
            f"{timedelta(seconds=round(seconds))}, ETA {time_left}"
        )
        short = (
            f"{shards}, ETA {time_left}, {documents:,.0f} documents/s, {text:.1f} MB/s, "
            f"{tokens:,.0f} tokens/s, {counts.malformed} malformed, "
            f"{counts.skipped_shards} skipped"
        )
        return full, short

    def _time_left(self) -> str:
        if self._bytes:
            under_way = sum(position for _, position in self._current.values())
            done = min(1.0, (self._finished_bytes + under_way) / self._bytes)
        else:
            done = self._finished_shards / max(1, self._shards)
        if not done:
            return "unknown"
        seconds = (time.perf_counter() - self.start) * (1 - done) / done
        return str(timedelta(seconds=round(seconds)))

    def _write_stderr(self, line: str) -> None:
        if self._width:
            print(file=sys.stderr)
            self._width = 0
        print(line, file=sys.stderr, flush=True)
