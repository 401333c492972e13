"""The parts of all shards, one after the other, become the datasets of the run.

`PREFIX_KEY_document.{bin,idx}`; with a split `PREFIX-train_KEY_document` and
`PREFIX-validation_KEY_document`; with groups `PREFIX-00000-of-00004_KEY_document`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ttt.data.atomic_file import remove_partials
from megatron_ttt.data.build_folder import VERSION, Plan, Workspace, publish_json, stream_name
from megatron_ttt.data.concatenation import Concatenation, Part
from megatron_ttt.data.indexed import Index, IndexWriter, bin_path, idx_path, token_dtype
from megatron_ttt.data.shard_jobs import Counts
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Output:
    """One dataset: its prefix, the shards it is made of, and which of their streams."""

    prefix: str
    shards: tuple[Shard, ...]
    stream: str
    split: str
    key: str

    @property
    def files(self) -> tuple[Path, Path]:
        return bin_path(self.prefix), idx_path(self.prefix)


def planned_outputs(output_prefix: str, plan: Plan) -> list[Output]:
    """The datasets of a plan. Raises `UserError` for a split or a group without a shard."""
    kind, groups = plan.options["split"], plan.options["groups"]
    if kind == "name":
        validation = tuple(shard for shard in plan.shards if "validation" in shard.name)
        train = tuple(shard for shard in plan.shards if "validation" not in shard.name)
        splits = {"train": train, "validation": validation}
    else:
        splits = dict.fromkeys(("train", "validation") if kind == "hash" else ("",), plan.shards)
    outputs = []
    for split, shards in splits.items():
        if not shards:
            raise UserError(f"no shard for the split {split!r}: --split name goes by file names")
        # A validation set is not blended: it stays one.
        count = 1 if split == "validation" else groups
        if len(shards) < count:
            raise UserError(f"--groups {count} of {len(shards)} shards; give at most that many")
        for group in range(count):
            part = shards[group * len(shards) // count : (group + 1) * len(shards) // count]
            name = f"{output_prefix}-{split}" if split else output_prefix
            name += f"-{group:05d}-of-{count:05d}" if count > 1 else ""
            for key in plan.options["json_keys"]:
                stream = stream_name(split if kind == "hash" else "", key)
                outputs.append(Output(f"{name}_{key}_document", part, stream, split, key))
    return outputs


def merge_tasks(workspace: Workspace, plan: Plan, on_error: str = "fail", workers: int = 1) -> dict:
    """Publish the datasets of a plan whose tasks are all done; the final manifest.

    The parts go as they are copied. Raises `UserError` for a shard that is not done, a part that is
    damaged, and a dataset without a token. Skipped shards are accepted with `on_error` "skip".
    """
    manifests = _load_manifests(workspace, plan, on_error)
    outputs = planned_outputs(workspace.output_prefix, plan)
    for output in outputs:
        _refuse_empty(workspace, output, manifests)
        remove_partials(Path(output.prefix).parent, f"{Path(output.prefix).name}.")
    dtype = token_dtype(plan.options["vocab_size"])
    indexes: list[IndexWriter] = []
    bins: list[Concatenation] = []
    results = {}
    try:
        for output in outputs:
            indexes.append(IndexWriter(output.prefix, dtype))
            for shard in output.shards:
                _append(workspace, shard, output.stream, manifests[shard.url], indexes[-1])
            parts = _parts(workspace, output, manifests)
            bins.append(Concatenation(bin_path(output.prefix), workspace.folder, parts))
            _refuse_damaged(workspace, output, parts, bins[-1].copy(workers))
            results[Path(output.prefix).name] = {
                "documents": indexes[-1].documents,
                "tokens": indexes[-1].tokens,
                "split": output.split,
                "key": output.key,
                "shards": [shard.url for shard in output.shards],
                "bin": {
                    "size": sum(part.size for part in parts),
                    "parts": [{"size": part.size, "sha256": part.sha256} for part in parts],
                },
                "idx": indexes[-1].finish(),
            }
        workspace.final_manifest.unlink(missing_ok=True)
        for index, tokens in zip(indexes, bins):
            index.publish(tokens.publish)
    finally:
        for index in indexes:
            index.discard()
    final = _final_manifest(plan, list(manifests.values()), results)
    publish_json(workspace.final_manifest, final)
    workspace.remove()
    return final


def _refuse_empty(workspace: Workspace, output: Output, manifests: dict[str, dict]) -> None:
    skipped = [manifests[shard.url]["skipped"] for shard in output.shards]
    if all(skipped):
        raise UserError(
            f"{output.prefix} would hold nothing: all of its shards, {len(skipped)}, were "
            f"skipped, the first as {skipped[0]}; mend them, or give fewer --groups"
        )
    if not any(manifests[shard.url]["streams"][output.stream]["tokens"] for shard in output.shards):
        where = f"in the {output.split} split of " if output.split else "in "
        raise UserError(
            f"no tokens under the key {output.key!r} {where}{workspace.output_prefix}; "
            "check --input and --json-keys"
        )


def _parts(workspace: Workspace, output: Output, manifests: dict[str, dict]) -> list[Part]:
    parts = []
    for shard in output.shards:
        expected = manifests[shard.url]["streams"][output.stream]["bin"]
        prefix = workspace.part_prefix(shard, output.stream)
        parts.append(Part(prefix, expected["size"], expected["sha256"]))
    return parts


def _load_manifests(workspace: Workspace, plan: Plan, on_error: str) -> dict[str, dict]:
    manifests = {}
    for shard in plan.shards:
        manifest = workspace.manifest(shard, plan.options, on_error, again=False)
        if manifest is None:
            raise UserError(
                f"{shard} is not done in {workspace.folder}; run its part of the build again, "
                "then merge"
            )
        manifests[shard.url] = manifest
    return manifests


def _append(
    workspace: Workspace, shard: Shard, stream: str, manifest: dict, index: IndexWriter
) -> None:
    """Append the documents of a shard to an index."""
    prefix = workspace.part_prefix(shard, stream)
    expected = manifest["streams"][stream]
    if file_sha256(idx_path(prefix)) != expected["idx"]["sha256"]:
        _begin_anew(workspace, [shard], prefix)
    for lengths in Index(prefix).tokens_per_document():
        index.append(lengths)


def _refuse_damaged(
    workspace: Workspace, output: Output, parts: list[Part], damaged: list[Part]
) -> None:
    if damaged:
        shards = [shard for shard, part in zip(output.shards, parts) if part in damaged]
        _begin_anew(workspace, shards, damaged[0].prefix)


def _begin_anew(workspace: Workspace, shards: Sequence[Shard], prefix: Path) -> None:
    """Let the next run do shards again, of which the part `prefix` is damaged."""
    for shard in shards:
        workspace.start_task(shard)
    name = f"{prefix} (and {len(shards) - 1} more)" if len(shards) > 1 else prefix
    raise UserError(
        f"{name} is damaged (its checksum is not its manifest's); run the same command again: it "
        "does this shard anew"
    )


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces."""
    with open(path, "rb") as stream:
        while chunk := stream.read(_COPY_BYTES):
            yield chunk


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _final_manifest(plan: Plan, manifests: Sequence[dict], outputs: dict) -> dict:
    totals = Counts()
    for manifest in manifests:
        totals.add_manifest(manifest)
    return {
        "version": VERSION,
        "tokenizer_model": plan.tokenizer_model,
        "options": plan.options,
        "totals": asdict(totals),
        "outputs": outputs,
        "shards": [
            manifest["input"]
            | {name: manifest[name] for name in ("documents", "malformed", "skipped")}
            | {
                "streams": {
                    name: {"documents": stream["documents"], "tokens": stream["tokens"]}
                    for name, stream in manifest["streams"].items()
                }
            }
            for manifest in manifests
        ],
    }
