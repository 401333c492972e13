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
from megatron_ttt.data.blend import parse_blend, times_read
from megatron_ttt.data.dataset import FixedBatches, build_datasets
from megatron_ttt.data.dataset_check import check_made_with
from megatron_ttt.data.indexed import bin_path, idx_path
from megatron_ttt.data.sampling import TokenLoader
from megatron_ttt.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    config_path,
    default_backend,
    load_tokenizer,
)
from megatron_ttt.errors import UserError, run_on_rank0
from megatron_ttt.platform import CUDA


@dataclass(frozen=True)
class Data:
    """The datasets of a run, and the token id that is masked as a target (None: none is).

    notes: what a user may not expect of them, a line each, for the log.
    """

    config: Config
    train: Dataset | None
    validation: Dataset | None
    validation_samples: int
    ignored_target_id: int | None
    notes: list[str]

    def train_batches(self, first_step: int, stop_step: int) -> Iterator[list[torch.Tensor]]:
        """This rank's microbatches, step by step: a list of int64 [micro_batch_size, L + 1]."""
        workers = self.config.data.num_workers
        return iter(self._loader(self.train, first_step, stop_step, num_workers=workers))

    def validation_batches(self) -> list[torch.Tensor]:
        """This rank's microbatches of the whole validation; the same at every call."""
        if self.validation is None:
            return []
        # Without workers: all is read at once while training waits, and they take long to start.
        return next(iter(self._loader(self.validation, 0, 1, self.validation_samples)))

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
            vocab_size=self.config.model.vocab_size,
        )


def open_data(config: Config, *, train: bool = True) -> Data:
    """Open what `data` names; collective. Raises UserError for what is missing or does not fit.

    train: False opens the validation alone.
    """
    data = config.data
    if train and bool(data.train) == bool(data.fixed_batches):
        raise UserError(
            "name the training data: either data.train (prefixes) or data.fixed_batches"
        )
    tokenizer = None
    if data.tokenizer_model is not None:
        tokenizer = load_tokenizer(data.tokenizer_model)
        check_vocabulary(tokenizer, config.model.vocab_size)
        prefixes = _prefixes(data.train if train else [], data.validation)
        run_on_rank0(
            lambda: [check_made_with(p, tokenizer, config.model.vocab_size) for p in prefixes]
        )
    elif data.train or data.validation:
        raise UserError("data.tokenizer_model is not set: name the model the data was made with")

    train_set, validation_set = build_index(config, train=train)
    notes = _repeats(config) if train_set else []
    validation_samples = 0
    if validation_set is not None:
        validation_samples, note = _validation_samples(config, len(validation_set))
        notes += note
    if train and data.fixed_batches:
        train_set = _fixed_batches(config)
    ignored_target_id = _ignored_target_id(config, tokenizer)
    return Data(config, train_set, validation_set, validation_samples, ignored_target_id, notes)


def build_index(config: Config, *, train: bool = True):
    """The training and the validation windows, whose indices are built where the cache lacks them.

    Collective where torch.distributed is initialised; else for this machine alone.
    """
    data, training = config.data, config.training
    return build_datasets(
        (train and data.train) or None,
        data.validation or None,
        train_samples=training.steps * training.global_batch_size,
        validation_samples=training.eval_batches * training.global_batch_size,
        seq_length=training.seq_length,
        seed=config.run.seed,
        cache_dir=index_folder(config),
    )


def index_folder(config: Config) -> Path:
    """Where the indices are kept."""
    return Path(config.data.cache_dir or Path(config.run.dir) / "cache")


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


def _prefixes(*blends: list[str]) -> list[str]:
    """The datasets of some blends as they are configured."""
    return [prefix for blend in blends if blend for prefix in parse_blend(blend)[0]]


def _repeats(config: Config) -> list[str]:
    """A line for each dataset that training passes over more than once."""
    training = config.training
    samples = training.steps * training.global_batch_size
    times = times_read(config.data.train, samples, training.seq_length)
    return [
        f"data.train: {training.steps} steps read {prefix} {passes:.2f} times over"
        for prefix, passes in times.items()
        if passes > 1
    ]


def _validation_samples(config: Config, held: int) -> tuple[int, list[str]]:
    """Sequences of one validation, of `held` that there are: whole microbatches on every rank.

    With a line where they are fewer than was asked for.
    """
    training, parallel = config.training, config.parallel
    unit = training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    if parallel.virtual_pipeline_model_parallel_size is not None:
        unit *= parallel.pipeline_model_parallel_size
    samples, asked = held // unit * unit, training.eval_batches * training.global_batch_size
    if samples == 0:
        raise UserError(
            f"data.validation holds {held} sequences of {training.seq_length} tokens, fewer than "
            f"the {unit} of one microbatch on every rank: give more, or lower "
            "training.micro_batch_size"
        )
    if samples == asked:
        return samples, []
    line = f"data.validation: a validation takes {samples} sequences, not the {asked} of "
    line += f"training.eval_batches={training.eval_batches}: there are {held}"
    return samples, [line]


def _ignored_target_id(config: Config, tokenizer: Tokenizer | None) -> int | None:
    bos_id = config.data.bos_id if tokenizer is None else tokenizer.bos_id
    # One token may be both: a model that is not taught it after a document never learns to stop.
    ends_documents = tokenizer is not None and bos_id == tokenizer.eos_id
    return bos_id if config.data.mask_bos and bos_id >= 0 and not ends_documents else None
