"""The files that a recipe names: tokens and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ttt.config import Config
from megatron_ttt.data.blend import parse_blend, times_read
from megatron_ttt.data.dataset_check import check_made_with
from megatron_ttt.data.indexed import check_indexed
from megatron_ttt.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_ttt.doctor.findings import Finding
from megatron_ttt.errors import UserError


def check_files(config: Config) -> Iterator[Finding]:
    """Whether each can be read, and whether the data has the tokens that the run will take."""
    training, data, tokenizer = config.training, config.data, None
    if data.tokenizer_model is not None:
        tokenizer, finding = _tokenizer(data.tokenizer_model, config.model.vocab_size)
        yield finding
    if data.fixed_batches is not None:
        yield _fixed_batches(data.fixed_batches)
    for key, blend in (("train", data.train), ("validation", data.validation)):
        try:
            prefixes = parse_blend(blend)[0] if blend else []
        except UserError as error:
            yield Finding("problem", f"data.{key}", str(error))
            continue
        whole = True
        for prefix in prefixes:
            try:
                info = check_indexed(prefix)
                if tokenizer is not None:
                    check_made_with(prefix, tokenizer, config.model.vocab_size)
            except UserError as error:
                whole = False
                yield Finding("problem", f"data.{key}", str(error))
                continue
            text = f"{prefix}, {info.documents:,} documents, {info.tokens:,} tokens"
            yield Finding("good", f"data.{key}", text)
        if key == "train" and prefixes and whole:
            samples = training.steps * training.global_batch_size
            for prefix, passes in times_read(blend, samples, training.seq_length).items():
                if passes > 1:
                    text = f"{prefix} is read {passes:.1f} times over"
                    yield Finding("note", "data.train", text)


def _tokenizer(path: str, vocab_size: int) -> tuple[Tokenizer | None, Finding]:
    try:
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, vocab_size)
    except UserError as error:
        return None, Finding("problem", "tokenizer", str(error))
    return tokenizer, Finding("good", "tokenizer", f"{path}, {tokenizer.vocab_size:,} pieces")


def _fixed_batches(path: str) -> Finding:
    try:
        shape = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        return Finding("problem", "data.fixed_batches", f"{path} cannot be read: {error}")
    return Finding("good", "data.fixed_batches", f"{Path(path)}, {shape}")
