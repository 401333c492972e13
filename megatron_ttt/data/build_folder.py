"""The state of a run between its start and its merge: `PREFIX.tasks/`, one task per input shard.

    plan.json                 options and shards of the run; others are refused
    TASK_STREAM.{bin,idx}     the shard's documents, a Megatron dataset of its own
    TASK.manifest.json        published last: the task is done
    TASK_STREAM.copied        in place of its .bin: where in the merged one it is (concatenation)
    lock                      held with flock by whoever works here; gone with its holder

Everything appears by fsync and rename. `PREFIX.manifest.json` beside the merged datasets says what
they were made from; it is published behind them, and then the folder goes.
"""

import fcntl
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from megatron_ttt.data.atomic_file import own_suffix, publish_bytes, refuse_folder, remove_partials
from megatron_ttt.data.indexed import bin_path, idx_path
from megatron_ttt.data.manifests import COPIED, FINAL, PLAN, TASK, fault
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

VERSION = 1
_NAME_BYTES = 100
"""Of a shard's name, in the names of its task's files: with all that is added they stay below the
255 bytes that file systems allow."""


def stream_name(split: str, key: str) -> str:
    return f"{split}_{key}" if split else key


@dataclass(frozen=True)
class Plan:
    """The options (as `Options.fingerprint` compares them) and the shards of a run, in order."""

    options: dict
    shards: tuple[Shard, ...]
    tokenizer_model: str

    def to_json(self) -> dict:
        return {
            "version": VERSION,
            "tokenizer_model": self.tokenizer_model,
            "options": self.options,
            "shards": [asdict(shard) for shard in self.shards],
        }

    @staticmethod
    def from_json(content: dict) -> "Plan":
        shards = tuple(Shard(s["url"], s["size"], s["modified"]) for s in content["shards"])
        return Plan(content["options"], shards, content["tokenizer_model"])


class Workspace:
    """The files of one output prefix."""

    def __init__(self, output_prefix: str) -> None:
        refuse_folder(output_prefix)
        output_prefix = os.path.abspath(output_prefix)
        self.output_prefix = output_prefix
        self.folder = Path(f"{output_prefix}.tasks")
        self.final_manifest = Path(f"{output_prefix}.manifest.json")
        self._plan = self.folder / "plan.json"

    def task_name(self, shard: Shard) -> str:
        digest, name = sha256(shard.url.encode()).hexdigest(), shard.name.encode()
        if len(name) <= _NAME_BYTES:
            return f"{shard.name}-{digest[:8]}"
        return f"{name[:_NAME_BYTES].decode(errors='ignore')}-{digest[:32]}"

    def part_prefix(self, shard: Shard, stream: str) -> Path:
        return self.folder / f"{self.task_name(shard)}_{stream}"

    def manifest_path(self, shard: Shard) -> Path:
        return self.folder / f"{self.task_name(shard)}.manifest.json"

    def load_plan(self) -> Plan | None:
        content = load_json(self._plan, PLAN)
        return Plan.from_json(content) if content else None

    def save_plan(self, plan: Plan) -> None:
        publish_json(self._plan, plan.to_json())

    def load_final(self) -> dict | None:
        return load_json(self.final_manifest, FINAL)

    def manifest(
        self, shard: Shard, options: dict, on_error: str, again: bool = True
    ) -> dict | None:
        """The manifest of a shard that is done, if it counts.

        It must be of these options, the shard must still have the size and time of change it had,
        and its parts must be there in their sizes. With `on_error` "fail" nothing may have been
        skipped; with `again`, a shard that was skipped as a whole does not count as done: it is
        tried again.
        """
        manifest = load_json(self.manifest_path(shard), TASK)
        if manifest is None or manifest["options"] != options or (manifest["skipped"] and again):
            return None
        if on_error == "fail" and (manifest["malformed"] or manifest["skipped"]):
            return None
        read = manifest["input"]
        if (read["listed_size"], read["modified"]) != (shard.size, shard.modified):
            return None
        for stream, counts in manifest["streams"].items():
            prefix = self.part_prefix(shard, stream)
            for path, file in ((bin_path(prefix), "bin"), (idx_path(prefix), "idx")):
                if file == "bin" and not path.exists() and copied_path(prefix).exists():
                    continue
                if not path.exists() or path.stat().st_size != counts[file]["size"]:
                    return None
        return manifest

    def start_task(self, shard: Shard) -> None:
        """Forget what an earlier attempt left."""
        self.manifest_path(shard).unlink(missing_ok=True)
        for path in self.folder.glob(f"{glob.escape(self.task_name(shard))}_*.copied"):
            path.unlink()

    def publish_manifest(self, shard: Shard, manifest: dict) -> None:
        publish_json(self.manifest_path(shard), manifest)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait until no other part of an array is looking at the plan, or making it."""
        with open(self.folder / "lock.plan", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def clear(self) -> None:
        """Remove all tasks. A kill leaves no manifest whose files are gone: the plan goes first,
        then the manifests, then what they name."""
        self._plan.unlink(missing_ok=True)
        files = [path for path in self.folder.iterdir() if not path.name.startswith("lock")]
        for path in sorted(files, key=lambda path: not path.name.endswith(".manifest.json")):
            path.unlink()

    def remove(self) -> None:
        """Remove the folder, once its result is published."""
        self.clear()
        shutil.rmtree(self.folder)

    @contextmanager
    def locked(self, part: str = "") -> Iterator[None]:
        """Hold the output alone, or one named part of it beside the holders of other parts.

        Raises `UserError` where another process holds it. A killed process holds nothing.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._flock("lock", fcntl.LOCK_SH if part else fcntl.LOCK_EX):
                if part:
                    with self._flock(f"lock.{part}", fcntl.LOCK_EX), self._own_partials_removed():
                        yield
                else:
                    remove_partials(self.folder)
                    try:
                        with self._own_partials_removed():
                            yield
                    finally:
                        if self.folder.is_dir() and not self._plan.exists():
                            shutil.rmtree(self.folder)
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or self.output_prefix}: {error.strerror or error}; "
                "what was done is kept: run the same command again to go on"
            ) from error

    @contextmanager
    def _own_partials_removed(self) -> Iterator[None]:
        """Files know what to discard once they are made; a signal may come while they are."""
        try:
            yield
        finally:
            remove_partials(self.folder, suffix=own_suffix())
            prefix = Path(self.output_prefix)
            remove_partials(prefix.parent, prefix.name, own_suffix())

    @contextmanager
    def _flock(self, name: str, kind: int) -> Iterator[None]:
        path = self.folder / name
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a+") as file:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise UserError(
                        f"another run works on {self.output_prefix} "
                        f"({file.read().strip() or 'an array task'}); wait for it or choose "
                        "another --output-prefix"
                    ) from None
                # The run that held it before may have finished and taken the file away.
                if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue
                if kind == fcntl.LOCK_EX:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                yield
                return


def refuse_other_options(prefix: str, before: dict, now: dict) -> None:
    """Raise `UserError` when a run with other options was begun here."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{prefix} was begun with other options: {key} was {before.get(key)!r} and is "
                f"{now.get(key)!r}; use the same, another --output-prefix, or --overwrite to begin "
                "again"
            )


def load_json(path: Path, shape: dict = FINAL) -> dict | None:
    """The content of a file, None where there is no such file.

    Raises `UserError` for a content that is not of the shape, one of `manifests`.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it to begin again") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise UserError(f"{path} is of another version; remove it to begin again")
    if place := fault(content, shape):
        raise UserError(f"{path} is damaged ({place}); remove it to begin again")
    return content


def copied_path(prefix: Path) -> Path:
    """What says that the .bin of a part is in its place already."""
    return Path(f"{prefix}.copied")


def load_copied(prefix: Path) -> dict | None:
    """Where that place is."""
    content = load_json(copied_path(prefix), COPIED)
    return content and {name: content[name] for name in COPIED}


def publish_json(path: Path, content: dict) -> None:
    publish_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
