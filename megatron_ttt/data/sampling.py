"""Which samples a rank trains on at which step, and the loader that fetches them.

Steps count from 0: step s is the one taken after s steps, and its global batch is the samples
[s * global_batch_size, (s + 1) * global_batch_size) of the dataset. Nothing else is remembered, so
a run resumes at step s by starting there.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_ttt.errors import UserError


def microbatch_indices(
    step: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """The sample indices of each microbatch of one data-parallel rank at one step.

    The global batch is cut into slices of micro_batch_size * dp_size samples, one per microbatch;
    a rank takes its micro_batch_size neighbours of each. Raises `UserError` when that does not
    come out even.
    """
    slice_size = micro_batch_size * dp_size
    if global_batch_size % slice_size:
        raise UserError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x {dp_size} data-parallel ranks; change one of them"
        )
    start = step * global_batch_size + dp_rank * micro_batch_size
    return [
        list(range(first, first + micro_batch_size))
        for first in range(start, start + global_batch_size, slice_size)
    ]


@dataclass(frozen=True)
class TokenLoader:
    """Iterates over the steps first_step <= s < stop_step of one data-parallel rank, and yields
    for each the list of its microbatches, int64 CPU tensors [micro_batch_size, L + 1].

    With `num_workers` the samples are fetched ahead in that many processes, which are spawned: a
    fork of a process that runs gloo or CUDA threads is not safe. `pin_memory` puts the microbatches
    where a GPU fetches them from while the host goes on. Raises `UserError` when the
    dataset ends before the last step, when the batch sizes do not come out even, and for a
    microbatch with a token id outside 0 .. vocab_size - 1 (None: none is): with TP the model
    would take it for another rank's entry and train on.
    """

    dataset: Dataset
    first_step: int
    stop_step: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._microbatches(self.first_step)
        held, asked = len(self.dataset), self.stop_step * self.global_batch_size
        if held < asked:
            raise UserError(
                f"the data holds {held} samples, {self.stop_step} steps take {asked}; "
                "train fewer steps or give more data"
            )

    def __len__(self) -> int:
        return self.stop_step - self.first_step

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        steps = range(self.first_step, self.stop_step)
        loader = DataLoader(
            self.dataset,
            batch_sampler=chain.from_iterable(map(self._microbatches, steps)),
            collate_fn=_stack,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            multiprocessing_context="spawn" if self.num_workers else None,
            # A generator of its own: DataLoader draws a seed, which must not advance the run's.
            generator=torch.Generator(),
            # A launcher signals the process group: they end when this process does.
            worker_init_fn=_leave_group,
        )
        fetched = iter(loader)
        for step in steps:
            microbatches = []
            for indices in self._microbatches(step):
                microbatches.append(next(fetched))
                self._check_ids(indices, microbatches[-1])
            yield microbatches

    def _microbatches(self, step: int) -> list[list[int]]:
        return microbatch_indices(
            step,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
        )

    def _check_ids(self, indices: list[int], tokens: torch.Tensor) -> None:
        if self.vocab_size is None:
            return
        least, largest = torch.aminmax(tokens)
        if least < 0 or largest >= self.vocab_size:
            wrong = (tokens < 0) | (tokens >= self.vocab_size)
            row, column = wrong.nonzero()[0].tolist()
            raise UserError(
                f"{self.dataset.place(indices[row], column)}: the id {tokens[row, column]} is "
                f"outside 0..{self.vocab_size - 1}; give data made for model.vocab_size="
                f"{self.vocab_size}, or run the preprocessing again"
            )


def _leave_group(worker: int) -> None:
    os.setsid()


def _stack(samples: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples))
