"""Is a finished dataset what its manifest says, a sound Megatron dataset, and the source's text?"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ttt.data.build import Dataset, open_run, run_tokenizer
from megatron_ttt.data.build_folder import stream_name
from megatron_ttt.data.concatenation import differing_part
from megatron_ttt.data.encoder import Encoder, Options
from megatron_ttt.data.indexed import CHUNK_DOCUMENTS, bin_path, idx_path
from megatron_ttt.data.local_engine import available_cpus
from megatron_ttt.data.reader import Block, parse_block, read_blocks
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

_SAMPLED_SHARDS = 8
_CHUNK_TOKENS = 1 << 24


def verify(
    output_prefix: str, tokenizer_model: str | None = None, samples: int = 64
) -> Iterator[str]:
    """Check all datasets of a build; one line for each thing that holds.

    `samples` documents of up to eight shards are encoded anew from the source and decoded. Raises
    `UserError` at the first thing that does not hold.
    """
    if samples < 0:
        raise UserError(f"--samples is {samples}; give 0 for none, or more")
    final, datasets = open_run(output_prefix)
    run_tokenizer(final, tokenizer_model)
    options = final["options"]
    for dataset in datasets:
        name = Path(dataset.prefix).name
        _check_files(dataset)
        yield f"{name}: sizes and checksums are those of the manifest"
        check_index(dataset)
        yield f"{name}: the index of {dataset.entry['documents']} documents is sound"
        bos = options["bos_id"] if options["prepend_bos"] else None
        eos = options["eos_id"] if options["append_eod"] else None
        _check_tokens(dataset, options["vocab_size"], bos, eos)
        ends = "" if eos is None else "; each document ends, and only ends, with EOS"
        yield f"{name}: {dataset.entry['tokens']} ids below {options['vocab_size']}{ends}"
    if samples:
        model = tokenizer_model or final["tokenizer_model"]
        compared, exact = _check_source(final, datasets, model, samples)
        rest = "" if exact == compared else ", the others to its normalised form"
        yield (
            f"{compared} documents encoded anew from the source give the same ids; "
            f"{exact} decode to the very text{rest}"
        )


def _check_files(dataset: Dataset) -> None:
    for path, file in ((bin_path(dataset.prefix), "bin"), (idx_path(dataset.prefix), "idx")):
        expected = dataset.entry[file]
        if path.stat().st_size != expected["size"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes where its manifest says "
                f"{expected['size']}; build it again with --overwrite"
            )
        if differing_part(path, expected.get("parts") or [expected], available_cpus()) is not None:
            raise UserError(
                f"{path} is damaged (its checksum is not its manifest's); build it again with "
                "--overwrite"
            )


def check_index(dataset: Dataset) -> None:
    """Check what a build's index has beyond a sound one: documents of one sequence, none empty.

    Raises `UserError` where it has not.
    """
    index = dataset.index

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(
                f"{idx_path(dataset.prefix)} is corrupt ({what}); build it again with --overwrite"
            )

    for start in range(0, len(index.lengths), CHUNK_DOCUMENTS):
        lengths = index.lengths[start : start + CHUNK_DOCUMENTS]
        require(bool((lengths > 0).all()), "a sequence without tokens")
    for start in range(0, len(index.documents) - 1, CHUNK_DOCUMENTS):
        steps = np.diff(index.documents[start : start + CHUNK_DOCUMENTS + 1])
        require(bool((steps <= 1).all()), "a document of several sequences")
    require(len(index.documents) - 1 == dataset.entry["documents"], "another number of documents")


def _check_tokens(dataset: Dataset, vocab_size: int, bos: int | None, eos: int | None) -> None:
    index, tokens = dataset.index, dataset.tokens
    found = {"BOS": 0, "EOS": 0}
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            raise UserError(
                f"{bin_path(dataset.prefix)} holds the id {int(chunk.max())} where the vocabulary "
                f"has {vocab_size}"
            )
        for name, control in (("BOS", bos), ("EOS", eos)):
            found[name] += int(np.count_nonzero(chunk == control)) if control is not None else 0
    for start in range(0, len(index.lengths), CHUNK_DOCUMENTS):
        firsts = index.offsets[start : start + CHUNK_DOCUMENTS] // index.dtype.itemsize
        lasts = firsts + index.lengths[start : start + CHUNK_DOCUMENTS] - 1
        for name, control, places in (("BOS", bos, firsts), ("EOS", eos, lasts)):
            if control is not None and bool((tokens[places] != control).any()):
                raise UserError(f"{bin_path(dataset.prefix)}: a document without {name} at its end")
    for name, control in (("BOS", bos), ("EOS", eos)):
        a_document = 2 if bos == eos else 1
        if control is not None and found[name] != a_document * len(index.lengths):
            raise UserError(f"{bin_path(dataset.prefix)}: {name} inside a document")


def _check_source(
    final: dict, datasets: list[Dataset], model: str, samples: int
) -> tuple[int, int]:
    """Documents compared, and how many of them decode to the very text of the source."""
    options = Options.from_fingerprint(final["options"], model)
    encoder = Encoder(options)
    rng = random.Random(0)
    shards = [entry for entry in final["shards"] if not entry["skipped"] and entry["documents"]]
    chosen = rng.sample(shards, min(_SAMPLED_SHARDS, len(shards)))
    compared = exact = 0
    for entry in chosen:
        count = min(entry["documents"], -(-samples // len(chosen)))
        numbers = set(rng.sample(range(entry["documents"]), count))
        places = _places(final, datasets, entry["url"])
        for number, texts in enumerate(_source_documents(entry, options)):
            split = encoder.split_of(texts)
            for key, text in zip(options.json_keys, texts):
                dataset, place = places[stream_name(split, key)]
                places[stream_name(split, key)] = dataset, place + 1
                if number in numbers:
                    compared += 1
                    exact += _compare(encoder, dataset, place, text, entry["url"], number)
            if number >= max(numbers):
                break
    return compared, exact


def _places(final: dict, datasets: list[Dataset], url: str) -> dict[str, tuple[Dataset, int]]:
    """For each stream of a shard: its dataset and the number of its first document there."""
    by_url = {entry["url"]: entry for entry in final["shards"]}
    places = {}
    for dataset in datasets:
        if url not in dataset.entry["shards"]:
            continue
        split = dataset.entry["split"] if final["options"]["split"] == "hash" else ""
        stream = stream_name(split, dataset.entry["key"])
        before = dataset.entry["shards"][: dataset.entry["shards"].index(url)]
        place = sum(by_url[earlier]["streams"][stream]["documents"] for earlier in before)
        places[stream] = dataset, place
    return places


def _source_documents(entry: dict, options: Options) -> Iterator[tuple[str, ...]]:
    shard = Shard(entry["url"], entry["listed_size"], entry["modified"])
    for item in read_blocks(shard, options.json_keys, options.max_document_bytes):
        if isinstance(item, Block):
            for _, texts in parse_block(
                item, options.json_keys, lambda *_: None, options.max_document_bytes
            ):
                yield texts


def _compare(
    encoder: Encoder, dataset: Dataset, place: int, text: str, url: str, number: int
) -> bool:
    stored = dataset.document(place)
    tokenizer = encoder.tokenizer
    if encoder.encode_text(text) != stored.tolist():
        raise UserError(
            f"document {place} of {dataset.prefix} is not document {number} of {url}: its ids "
            "differ; build it again with --overwrite"
        )
    decoded = tokenizer.decode(stored.tolist())
    if decoded.lstrip() != tokenizer.normalize(text).lstrip() and tokenizer.is_lossless(stored):
        raise UserError(
            f"document {place} of {dataset.prefix} does not decode to its source, {url}"
        )
    return decoded == text
