"""Documents -> token ids -> `.bin`/`.idx`: a run, from its arguments to its datasets.

A run is one task for each input shard, then a merge. What is done is never done twice: the same
command goes on where an earlier one stopped, whatever stopped it.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ttt.data.atomic_file import refuse_existing
from megatron_ttt.data.build_folder import Plan, Workspace, refuse_other_options
from megatron_ttt.data.encoder import Encoder, Options
from megatron_ttt.data.local_engine import available_cpus, run_locally
from megatron_ttt.data.merge import merge_tasks, planned_outputs
from megatron_ttt.data.progress import Progress
from megatron_ttt.data.reader import MAX_DOCUMENT_BYTES
from megatron_ttt.data.shard_jobs import BuildJob
from megatron_ttt.data.shards import find_shards
from megatron_ttt.data.signals import stop_on_signals
from megatron_ttt.data.tokenizer import default_backend
from megatron_ttt.errors import UserError

ENGINES = ("local", "ray")
SPLITS = ("none", "name", "hash")


@dataclass(frozen=True)
class Summary:
    """What the datasets of a run hold; `tokens` has one entry per JSON key."""

    documents: int
    tokens: dict[str, int]
    text_bytes: int
    malformed_lines: int
    skipped_shards: int


@stop_on_signals()
def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_model: str | Path,
    *,
    backend: str | None = None,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    prepend_bos: bool = False,
    split: str = "none",
    validation_fraction: float = 0.0,
    groups: int = 1,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    on_error: str = "fail",
    engine: str = "local",
    workers: int = 1,
    array: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Summary | None:
    """Tokenize the shards that match `inputs` into `PREFIX_KEY_document.{bin,idx}` for each key.

    The files are byte for byte those of Megatron-LM's `tools/preprocess_data.py`. Nothing stands
    under their names before all of it is written. `array` (i, n) does the i-th of n ranges of the
    shards and no merge, and returns None.

    Raises `UserError` for input that cannot be read or holds no tokens (`on_error` "skip": leaves
    out what is bad), existing output, a run with other options under the same prefix, another run
    at work on it, and a model without the piece an option needs.
    SIGINT and SIGTERM end the process with 128 plus their number.
    """
    options = Options(
        tokenizer_model=os.path.abspath(tokenizer_model),
        backend=backend or default_backend(tokenizer_model),
        json_keys=tuple(json_keys),
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        split=split,
        validation_fraction=validation_fraction,
        groups=groups,
        max_document_bytes=max_document_bytes,
    )
    _check(options, array, overwrite)
    encoder = Encoder(options)
    shards = find_shards(inputs)
    plan = Plan(options.fingerprint(encoder.tokenizer), tuple(shards), options.tokenizer_model)
    workspace = Workspace(output_prefix)
    # Without the lock first: a finished run may lie where nothing can be written any more.
    if (final := _finished(workspace, plan, overwrite)) is not None:
        return _nothing_to_do(output_prefix, final)
    part = f"{array[0]}-of-{array[1]}" if array else ""
    with workspace.locked(part):
        with workspace.planning():
            final = _begin(workspace, plan, overwrite, array is not None)
        if final is not None:
            return _nothing_to_do(output_prefix, final)
        if array:
            index, count = array
            shards = shards[index * len(shards) // count : (index + 1) * len(shards) // count]
        todo = [s for s in shards if workspace.manifest(s, plan.options, on_error) is None]
        job = BuildJob(workspace.output_prefix, options, plan.options, on_error)
        log = Path(f"{workspace.output_prefix}{f'.{part}' if part else ''}.log")
        progress = Progress(log, todo)
        progress.log(f"begins: {len(todo)} shards to do, {json.dumps(plan.options)}")
        try:
            if len(todo) < len(shards):
                progress.note(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
            if engine == "ray":
                from megatron_ttt.data.ray_engine import run_on_ray

                run_on_ray(job, todo, progress)
            else:
                run_locally(job, todo, encoder, progress, workers)
            if array:
                return None
            final = merge_tasks(workspace, plan, on_error, workers)
            progress.note(_published(final))
            return _summary(final)
        finally:
            progress.close()


@stop_on_signals()
def merge(output_prefix: str, on_error: str = "fail") -> Summary:
    """Publish the datasets of a run whose parts (`array`) are all done.

    Raises `UserError` where a shard is missing, and with `on_error` "fail" where one was skipped.
    """
    workspace = Workspace(output_prefix)
    if workspace.folder.is_dir():
        with workspace.locked():
            plan = workspace.load_plan()
            if plan is not None:
                final = merge_tasks(workspace, plan, on_error, available_cpus())
                print(_published(final), file=sys.stderr)
                return _summary(final)
    final = workspace.load_final()
    if final is None:
        raise UserError(f"{workspace.folder} holds no plan; run the parts of the build first")
    return _nothing_to_do(output_prefix, final)


def _check(options: Options, array: tuple[int, int] | None, overwrite: bool) -> None:
    if options.split == "hash" and not 0 < options.validation_fraction < 1:
        raise UserError(
            f"--split hash needs a --validation-fraction between 0 and 1, not "
            f"{options.validation_fraction}"
        )
    if options.split != "hash" and options.validation_fraction:
        raise UserError("--validation-fraction goes with --split hash; leave it out")
    if options.groups < 1:
        raise UserError(f"--groups is {options.groups}; give at least 1")
    if len(set(options.json_keys)) < len(options.json_keys):
        raise UserError(f"--json-keys {' '.join(options.json_keys)} names one twice")
    if array and not 0 <= array[0] < array[1]:
        raise UserError(f"--array {array[0]}/{array[1]} is no part; the first is 0/{array[1]}")
    if array and overwrite:
        raise UserError("--array does not go with --overwrite; remove the old output first")


def _finished(workspace: Workspace, plan: Plan, overwrite: bool) -> dict | None:
    """The final manifest where all of the plan is done already.

    Raises `UserError` where something else is.
    """
    final = workspace.load_final()
    if final is None or overwrite or workspace.load_plan() is not None:
        return None
    refuse_other_options(workspace.output_prefix, final["options"], plan.options)
    made_from = [(s["url"], s["listed_size"], s["modified"]) for s in final["shards"]]
    if made_from != [(shard.url, shard.size, shard.modified) for shard in plan.shards]:
        raise UserError(
            f"{workspace.output_prefix} was made from other shards, or they have changed; "
            "choose another --output-prefix or give --overwrite"
        )
    return final if all(path.exists() for path in _files(workspace, plan)) else None


def _files(workspace: Workspace, plan: Plan) -> list[Path]:
    outputs = planned_outputs(workspace.output_prefix, plan)
    return [path for output in outputs for path in output.files]


def _begin(workspace: Workspace, plan: Plan, overwrite: bool, array: bool) -> dict | None:
    """Make the folder ready for the plan; the final manifest where all of it is done already."""
    files = _files(workspace, plan)
    if (final := _finished(workspace, plan, overwrite)) is not None:
        return final
    before = workspace.load_plan()
    if before is not None and before.options != plan.options:
        if not overwrite:
            refuse_other_options(workspace.output_prefix, before.options, plan.options)
        before = None
    if before is None:
        refuse_existing(files, overwrite or workspace.load_final() is not None)
        workspace.clear()
        workspace.save_plan(plan)
    elif before.shards != plan.shards:
        if array and [s.url for s in before.shards] != [s.url for s in plan.shards]:
            raise UserError(
                f"{workspace.folder} was planned with other shards; give every part of the array "
                "the same --input, or remove the folder to begin again"
            )
        workspace.save_plan(plan)
    return None


def _nothing_to_do(output_prefix: str, final: dict) -> Summary:
    print(f"{output_prefix} is complete: nothing to do", file=sys.stderr)
    return _summary(final)


def _published(final: dict) -> str:
    totals, names = final["totals"], ", ".join(final["outputs"])
    return f"published {names}: {totals['documents']:,} documents, {totals['tokens']:,} tokens"


def _summary(final: dict) -> Summary:
    totals, tokens = final["totals"], dict.fromkeys(final["options"]["json_keys"], 0)
    for output in final["outputs"].values():
        tokens[output["key"]] += output["tokens"]
    return Summary(
        documents=totals["documents"],
        tokens=tokens,
        text_bytes=totals["text_bytes"],
        malformed_lines=totals["malformed"],
        skipped_shards=totals["skipped_shards"],
    )
