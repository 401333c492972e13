"""From a configuration to the microbatches of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import Dataset

from megatron_ttt.config import Config
from megatron_ttt.data.dataset import FixedBatches, build_datasets, parse_blend
from megatron_ttt.data.indexed import bin_path, check_indexed, idx_path
from megatron_ttt.data.provenance import check_made_with
from megatron_ttt.data.sampling import TokenLoader
from megatron_ttt.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    config_path,
    default_backend,
    load_tokenizer,
)
from megatron_ttt.errors import UserError, of_rank_0
from megatron_ttt.platform import CUDA


@dataclass(frozen=True)
class Data:
    """The datasets of a run, and the token id that is masked as a target (None: none is)."""

    config: Config
    train: Dataset | None
    validation: Dataset | None
    masked_id: int | None

    def train_batches(self, first_step: int, stop_step: int) -> Iterator[list[torch.Tensor]]:
        """This rank's microbatches, step by step: a list of int64 [micro_batch_size, L + 1]."""
        workers = self.config.data.num_workers
        return iter(self._loader(self.train, first_step, stop_step, num_workers=workers))

    def validation_batches(self) -> list[torch.Tensor]:
        """This rank's microbatches of the whole validation; the same at every call."""
        if self.validation is None:
            return []
        # Without workers: all is read at once while training waits, and they take long to start.
        return next(iter(self._loader(self.validation, 0, 1, len(self.validation))))

    def _loader(
        self, dataset, first_step, stop_step, batch_size=None, num_workers=0
    ) -> TokenLoader:
        training = self.config.training
        return TokenLoader(
            dataset,
            first_step,
            stop_step,
            batch_size or training.global_batch_size,
            training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            num_workers,
            pin_memory=dist.get_backend() == CUDA.backend,
        )


def open_data(config: Config, *, train: bool = True) -> Data:
    """Open what `data` names; collective. Raises UserError for what is missing or does not fit.

    train: False opens the validation alone.
    """
    data, training = config.data, config.training
    if train and bool(data.train) == bool(data.fixed_batches):
        raise UserError(
            "name the training data: either data.train (prefixes) or data.fixed_batches"
        )
    tokenizer = None
    if data.tokenizer_model is not None:
        tokenizer = load_tokenizer(data.tokenizer_model)
        check_vocabulary(tokenizer, config.model.vocab_size)
        prefixes = _prefixes(data.train if train else [], data.validation)
        of_rank_0(
            lambda: [check_made_with(p, tokenizer, config.model.vocab_size) for p in prefixes]
        )
    elif data.train or data.validation:
        raise UserError("data.tokenizer_model is not set: name the model the data was made with")

    train_blend = _blend(data.train) if train else None
    validation_blend = _blend(data.validation)
    train_set, validation_set = build_datasets(
        train_blend,
        validation_blend,
        train_samples=training.steps * training.global_batch_size,
        validation_samples=_validation_samples(config, validation_blend),
        seq_length=training.seq_length,
        seed=config.run.seed,
        tokenizer=tokenizer,
        cache_dir=data.cache_dir or Path(config.run.dir) / "cache",
    )
    if train and data.fixed_batches:
        train_set = _fixed_batches(config)
    return Data(config, train_set, validation_set, _masked_id(config, tokenizer))


def data_files(config: Config) -> list[Path]:
    """The files that decide what a run trains and validates on."""
    data = config.data
    files = [Path(path) for path in (data.fixed_batches, data.tokenizer_model) if path]
    if data.tokenizer_model and default_backend(data.tokenizer_model) == "huggingface":
        files.append(config_path(data.tokenizer_model))
    for prefix in _prefixes(data.train, data.validation):
        files += [bin_path(prefix), idx_path(prefix)]
    return files


def _fixed_batches(config: Config) -> FixedBatches:
    path, training = config.data.fixed_batches, config.training
    batches = FixedBatches(path)
    for key, here, there in (
        ("global_batch_size", training.global_batch_size, batches.batch_size),
        ("seq_length", training.seq_length, batches.seq_length),
    ):
        if here != there:
            raise UserError(f"training.{key}={here}, but {path} holds batches of {there}: set that")
    return batches


def _prefixes(*entries: list[str]) -> list[str]:
    """The datasets of some blends as they are configured."""
    return [prefix for blend in map(_blend, entries) if blend for prefix in parse_blend(blend)[0]]


def _blend(entries: list[str]) -> list[str | float] | None:
    """Configured entries with the weights, which every second one may be, as numbers."""
    blend = [_number(entry) if index % 2 == 0 else entry for index, entry in enumerate(entries)]
    if len(blend) == 1 or not isinstance(next(iter(blend), ""), float):
        blend = list(entries)
    return blend or None


def _number(entry: str) -> float | str:
    try:
        return float(entry)
    except ValueError:
        return entry


def _validation_samples(config: Config, blend: list[str | float] | None) -> int:
    """Sequences of one validation: `eval_batches` global batches, or what one pass over the data
    gives in whole microbatches (megatron-core would start over without a word)."""
    if blend is None:
        return 0
    training, parallel = config.training, config.parallel
    prefixes, _ = parse_blend(blend)
    held = sum((check_indexed(p).tokens - 1) // training.seq_length for p in prefixes)
    unit = training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    if parallel.virtual_pipeline_model_parallel_size is not None:
        unit *= parallel.pipeline_model_parallel_size
    samples = min(training.eval_batches * training.global_batch_size, held) // unit * unit
    if samples == 0:
        raise UserError(
            f"data.validation holds {held} sequences of {training.seq_length} tokens, fewer than "
            f"the {unit} of one microbatch on every rank: give more, or lower "
            "training.micro_batch_size"
        )
    return samples


def _masked_id(config: Config, tokenizer: Tokenizer | None) -> int | None:
    bos_id = config.data.bos_id if tokenizer is None else tokenizer.bos_id
    # One token may be both: a model that is not taught it after a document never learns to stop.
    ends_documents = tokenizer is not None and bos_id == tokenizer.eos_id
    return bos_id if config.data.mask_bos and bos_id >= 0 and not ends_documents else None
