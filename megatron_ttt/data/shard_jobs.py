"""The tasks of a run: one input shard each, read, encoded, written and published with a manifest.

`shard_items` reads, something encodes (this process, a pool, another machine), `write_tasks` writes
in the same order. A failure of a shard travels along as an item, so that the tasks before it are
finished and published first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_ttt.data.build_folder import VERSION, Workspace, stream_name
from megatron_ttt.data.encoder import EncodedBlock, Options
from megatron_ttt.data.indexed import IndexedWriter
from megatron_ttt.data.reader import Block, ShardRead, read_blocks
from megatron_ttt.data.shards import Shard, ShardError
from megatron_ttt.errors import UserError

ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class BuildJob:
    """The arguments that all tasks of a run share, on whatever machine they run."""

    output_prefix: str
    options: Options
    fingerprint: dict
    """Of the options and the tokenizer's files; what manifests record."""
    on_error: str
    """What is done with bad input: "fail", or "skip" it."""

    @property
    def workspace(self) -> Workspace:
        """The folder of the run."""
        return Workspace(self.output_prefix)


@dataclass(frozen=True)
class ShardFailed:
    """A shard could not be read to its end."""

    reason: str


@dataclass
class Counts:
    """What one or many tasks read and wrote."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0
    skipped_shards: int = 0

    @staticmethod
    def of_block(block: EncodedBlock) -> "Counts":
        return Counts(
            documents=block.documents,
            tokens=sum(int(lengths.sum()) for _, lengths in block.streams),
            text_bytes=block.text_bytes,
            empty=block.empty,
            malformed=len(block.malformed),
        )

    def add(self, other: "Counts") -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def add_manifest(self, manifest: dict) -> None:
        self.documents += manifest["documents"]
        self.tokens += sum(stream["tokens"] for stream in manifest["streams"].values())
        self.text_bytes += manifest["text_bytes"]
        self.empty += manifest["empty"]
        self.malformed += manifest["malformed"]
        self.skipped_shards += bool(manifest["skipped"])


class Listener:
    """What hears of the work as it goes on; `Progress` is one."""

    def block(self, shard: Shard, counts: Counts, position: int) -> None:
        """A block was written: what it holds, and where in the stored shard it ends."""

    def task(self, shard: Shard, manifest: dict) -> None:
        """A shard is done."""

    def note(self, message: str) -> None:
        """Something the user should read."""


def shard_items(
    shards: Iterable[Shard], options: Options
) -> Iterator[Block | ShardRead | ShardFailed]:
    """The blocks of each shard, behind them what became of it."""
    for shard in shards:
        try:
            yield from read_blocks(shard, options.json_keys, options.max_document_bytes)
        except ShardError as error:
            yield ShardFailed(str(error))


def write_tasks(
    job: BuildJob,
    shards: Sequence[Shard],
    items: Iterator[EncodedBlock | ShardRead | ShardFailed],
    dtype: np.dtype,
    listener: Listener,
) -> None:
    """Write the items of the shards, in their order; each shard is published when it is whole.

    dtype: of token ids. With `on_error` "fail" the first bad line or shard raises `UserError`; with
    "skip" bad lines are left out, and of a bad shard everything.
    """
    for shard in shards:
        task = _TaskWriter(job, shard, dtype, listener)
        try:
            for item in items:
                if isinstance(item, EncodedBlock):
                    task.add(item)
                else:
                    task.finish(item)
                    break
        finally:
            task.discard()


class _TaskWriter:
    def __init__(self, job: BuildJob, shard: Shard, dtype: np.dtype, listener: Listener) -> None:
        self._workspace, self._shard, self._listener = job.workspace, shard, listener
        self._fingerprint, self._skip, self._dtype = job.fingerprint, job.on_error == "skip", dtype
        self._counts = Counts()
        self._workspace.start_task(shard)
        self._writers: dict[str, IndexedWriter] = {}
        self._streams = [stream_name(*stream) for stream in job.options.streams]
        self._open()

    def _open(self) -> None:
        for name in self._streams:
            prefix = self._workspace.part_prefix(self._shard, name)
            self._writers[name] = IndexedWriter(prefix, self._dtype)

    def add(self, block: EncodedBlock) -> None:
        if block.refused:
            raise UserError(
                f"{self._shard}:{block.refused}: gigatoken gives other ids than SentencePiece; "
                "begin again with --tokenizer-backend sentencepiece --overwrite"
            )
        for line, reason in block.malformed:
            message = f"{self._shard}:{line}: {reason}"
            if not self._skip:
                raise UserError(f"{message}; mend it, or leave such lines out: --on-error skip")
            self._listener.note(f"skipped {message}")
        for writer, (tokens, lengths) in zip(self._writers.values(), block.streams):
            writer.append(tokens, lengths)
        counts = Counts.of_block(block)
        self._counts.add(counts)
        self._listener.block(self._shard, counts, block.position)

    def finish(self, end: ShardRead | ShardFailed) -> None:
        reason = end.reason if isinstance(end, ShardFailed) else ""
        if not reason and not self._counts.documents and not self._counts.malformed:
            reason = f"{self._shard} holds no documents; leave it out or fetch it again"
        if reason and not self._skip:
            raise UserError(reason)
        if reason:
            self._listener.note(f"skipped {reason}")
            self.discard()
            self._counts = Counts()
            self._open()
        files = {name: writer.finish() for name, writer in self._writers.items()}
        for writer in self._writers.values():
            writer.publish()
        manifest = {
            "version": VERSION,
            "input": {
                "url": self._shard.url,
                "listed_size": self._shard.size,
                "modified": self._shard.modified,
                "size": end.size if isinstance(end, ShardRead) else None,
                "sha256": end.sha256 if isinstance(end, ShardRead) else None,
            },
            "options": self._fingerprint,
            "documents": self._counts.documents,
            "text_bytes": self._counts.text_bytes,
            "empty": self._counts.empty,
            "malformed": self._counts.malformed,
            "skipped": reason,
            "streams": {
                name: {"documents": writer.documents, "tokens": writer.tokens} | files[name]
                for name, writer in self._writers.items()
            },
        }
        self._workspace.publish_manifest(self._shard, manifest)
        self._listener.task(self._shard, manifest)

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()
