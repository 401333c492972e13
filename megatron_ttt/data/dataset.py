"""What training reads: windows of packed tokens, drawn from one dataset or from a blend.

Shapes: L is seq_length. A sample is int64 [L + 1]: inputs are [:-1], targets [1:]. Documents are
packed one after the other; a sample may begin and end inside one. Sample i depends on the blend,
L and the seed alone, not on the rank or on how many samples are asked for, so that a run's state is
one integer and a longer run begins with the samples of a shorter one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets import helpers
from torch.utils.data import Dataset

from megatron_ttt.data.blend import Blend, parse_blend
from megatron_ttt.data.index_cache import cached_entry, has_entry, load_arrays, open_cache
from megatron_ttt.data.indexed import Index, check_indexed
from megatron_ttt.data.windows import Windows, draw_epochs, epochs_for, windows_in
from megatron_ttt.errors import UserError, run_on_every_rank, run_on_rank0


@dataclass(frozen=True)
class _Entries:
    """What rank 0 has left in the cache for one dataset of samples, which every rank opens."""

    num_samples: int
    windows: list[tuple[str, Path]]  # of each prefix
    blend: Path | None  # which prefix each sample is of, and which of its windows; None: of one


class TokenWindows(Dataset):
    """Samples of one dataset or of a blend."""

    def __init__(self, entries: _Entries) -> None:
        self._entries = entries
        self._windows = [Windows(prefix, entry) for prefix, entry in entries.windows]
        self._blend = entries.blend and load_arrays(entries.blend, "prefix", "window")

    def __reduce__(self):
        return type(self), (self._entries,)  # other processes map the files again

    def __len__(self) -> int:
        return self._entries.num_samples

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, int64 [L + 1]."""
        windows, number = self._find(index)
        return windows[number]

    def place(self, index: int, column: int) -> str:
        """The file and the place in it of one token of a sample, in words."""
        windows, number = self._find(index)
        return f"{windows.path}, token {windows.place(number, column)}"

    def _find(self, index: int) -> tuple[Windows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self._blend is None:
            return self._windows[0], index
        prefix, window = self._blend
        return self._windows[prefix[index]], int(window[index])


class FixedBatches(Dataset):
    """Whole batches from a `.npy` file [S, B, L + 1] of token ids: sample i is row i % B of batch
    i // B. For reproductions: with a global batch size of B, step s trains on batch s."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        try:
            self._batches = np.lib.format.open_memmap(path, mode="r")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is not a whole .npy file ({error})") from error
        shape, dtype = self._batches.shape, self._batches.dtype
        if len(shape) != 3 or dtype.kind not in "iu":
            raise UserError(
                f"{path} holds {dtype} {list(shape)}; needed are integer token ids [S, B, L + 1]"
            )
        self.steps, self.batch_size, window = shape
        self.seq_length = window - 1

    def __reduce__(self):
        return type(self), (self._path,)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, int64 [L + 1]."""
        batch, row = divmod(index, self.batch_size)
        return self._batches[batch, row].astype(np.int64)

    def place(self, index: int, column: int) -> str:
        """The file and the place in it of one token of a sample, in words."""
        batch, row = divmod(index, self.batch_size)
        return f"{self._path}, batch {batch}, row {row}, column {column}"


def build_datasets(
    train: Blend | None,
    validation: Blend | None,
    *,
    train_samples: int,
    validation_samples: int,
    seq_length: int,
    seed: int,
    cache_dir: str | Path,
) -> tuple[TokenWindows | None, TokenWindows | None]:
    """The training and the validation dataset, of one sample or more; None for a blend of None.

    Collective: where torch.distributed is initialised every rank calls it. Rank 0 builds the sample
    indices in `cache_dir`, and so does one rank of each node whose folder is another. Blends
    without weights are drawn from in proportion to their tokens. Training data smaller than the
    number of samples repeats, epoch by epoch; validation takes each window once, and ends where the
    first dataset of a blend has no more to give: it may be smaller than `validation_samples`.
    Raises `UserError` for a bad blend, for missing or damaged files, and for data too small to fill
    one sample.
    """

    def build() -> list[_Entries | None]:
        blends = [blend and _read_blend(blend, seq_length) for blend in (train, validation)]
        if blends == [None, None]:
            return blends
        folder = Path(cache_dir)
        with open_cache(folder):
            training = blends[0] and _draw(blends[0], train_samples, seq_length, seed, folder)
            once = blends[1] and _draw(
                blends[1], validation_samples, seq_length, seed, folder, once=True
            )
        return [training, once]

    if dist.is_initialized():
        built = run_on_rank0(build)
        run_on_every_rank(lambda: None if all(map(_is_here, built)) else build())
    else:
        built = build()
    train_set, validation_set = (entries and TokenWindows(entries) for entries in built)
    return train_set, validation_set


def _is_here(entries: _Entries | None) -> bool:
    """Whether this node sees what rank 0 has left in the cache."""
    found = [entry for _, entry in entries.windows] if entries else []
    found += [entries.blend] if entries and entries.blend else []
    return all(map(has_entry, found))


@dataclass(frozen=True)
class _CheckedBlend:
    """Prefixes of sound pairs, the weights they were given, and the tokens that each holds."""

    prefixes: list[str]
    weights: list[float] | None
    tokens: list[int]


def _read_blend(blend: Blend, seq_length: int) -> _CheckedBlend:
    prefixes, weights = parse_blend(blend)
    tokens = [check_indexed(prefix).tokens for prefix in prefixes]
    for prefix, held in zip(prefixes, tokens):
        if held <= seq_length:
            raise UserError(
                f"{prefix} holds {held} tokens, too few for one sample of {seq_length} + 1; "
                "give more text or a smaller seq_length"
            )
    return _CheckedBlend(prefixes, weights, tokens)


def _draw(
    blend: _CheckedBlend,
    num_samples: int,
    seq_length: int,
    seed: int,
    folder: Path,
    *,
    once: bool = False,
) -> _Entries:
    """Leave in the cache what `num_samples` samples are; with `once` no window comes twice."""
    held = [windows_in(1, tokens, seq_length) for tokens in blend.tokens]
    if once:
        num_samples = min(num_samples, sum(held))
    mixed, taken = None, [num_samples]
    if len(blend.prefixes) > 1:
        weights = blend.weights or (held if once else blend.tokens)
        limits = held if once else None
        mixed = cached_entry(
            folder,
            {"weights": weights, "samples": num_samples, "limits": limits},
            lambda: _mix(weights, num_samples, limits),
        )
        (prefix,) = load_arrays(mixed, "prefix")
        num_samples, taken = len(prefix), np.bincount(prefix, minlength=len(held)).tolist()
    windows = []
    for prefix, tokens, count in zip(blend.prefixes, blend.tokens, taken):
        lengths, epochs = Index(prefix).lengths, epochs_for(count, tokens, seq_length)
        description = {
            "lengths": hashlib.sha256(lengths).hexdigest(),
            "epochs": epochs,
            "seq_length": seq_length,
            "seed": seed,
        }
        entry = cached_entry(
            folder,
            description,
            lambda lengths=lengths, epochs=epochs: draw_epochs(lengths, epochs, seq_length, seed),
        )
        windows.append((prefix, entry))
    return _Entries(num_samples, windows, mixed)


def _mix(weights: list[float], num_samples: int, limits: list[int] | None) -> dict[str, np.ndarray]:
    """Which prefix each sample is of, int16 [samples], and which of its windows, int64 [samples].

    Each sample is of the prefix that is furthest behind its weight. limits: the windows of each
    prefix; the samples end before one that would go beyond.
    """
    prefix, window = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    shares = np.array(weights, np.float64) / np.sum(weights)
    helpers.build_blending_indices(prefix, window, shares, len(weights), num_samples, False)
    if limits is not None:
        beyond = np.flatnonzero(window >= np.array(limits)[prefix])
        stop = beyond[0] if len(beyond) else num_samples
        prefix, window = prefix[:stop], window[:stop]
    return {"prefix": prefix, "window": window}
