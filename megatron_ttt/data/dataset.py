"""What training reads: windows of packed tokens, as megatron-core's GPTDataset draws them.

Shapes: L is seq_length. A sample is int64 [L + 1]: inputs are [:-1], targets [1:]. Documents are
packed one after the other; a sample may begin and end inside one. Sample i does not depend on the
rank, so a run's data is fixed by (blend, number of samples, seed), and its state is one integer.
Asking for another number of samples may change their order: when it needs another number of epochs.
"""

import contextlib
import copyreg
import fcntl
import hashlib
import io
import math
import mmap
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_ttt.data.indexed import bin_path, check_indexed, idx_path
from megatron_ttt.data.tokenizer import Tokenizer
from megatron_ttt.errors import UserError

Blend = str | Sequence[str | float]
"""A prefix, a list of prefixes, or weights and prefixes by turns: [0.3, "a", 0.7, "b"]."""


class _FilePickler(pickle.Pickler):
    """Arrays that are mapped from a file go as its name: a loader's processes map it again."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, GPTDataset):
            # `indices`, a number for each document, is asked for only while others are built.
            return copyreg.__newobj__, (type(value),), {**vars(value), "indices": None}
        # A part of a mapped array is one too, but says where the whole begins.
        if not (type(value) is np.memmap and isinstance(value.base, mmap.mmap)):
            return NotImplemented
        order = "C" if value.flags.c_contiguous else "F"
        return np.memmap, (value.filename, value.dtype, "r", value.offset, value.shape, order)


class _MappedDataset(Dataset):
    """One whose mapped arrays other processes map too."""

    def __reduce__(self):
        content = io.BytesIO()
        _FilePickler(content).dump(vars(self))
        return _restored, (type(self), content.getvalue())


def _restored(kind: type, content: bytes) -> _MappedDataset:
    dataset = kind.__new__(kind)
    vars(dataset).update(pickle.loads(content))
    return dataset


class TokenWindows(_MappedDataset):
    """The first `num_samples` samples of a megatron-core dataset.

    `epochs` is how often the samples pass over the blend's tokens: above 1, text repeats.
    """

    def __init__(self, samples: Dataset, num_samples: int, epochs: float) -> None:
        self._samples = samples
        self._num_samples = num_samples
        self.epochs = epochs

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, int64 [L + 1]."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        sample = self._samples[index]
        return np.append(sample["tokens"].numpy(), sample["labels"][-1].item())


class FixedBatches(_MappedDataset):
    """Whole batches from a `.npy` file [S, B, L + 1] of token ids: sample i is row i % B of batch
    i // B. For reproductions: with a global batch size of B, step s trains on batch s."""

    def __init__(self, path: str | Path) -> None:
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

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, int64 [L + 1]."""
        batch, row = divmod(index, self.batch_size)
        return self._batches[batch, row].astype(np.int64)


def build_datasets(
    train: Blend | None,
    validation: Blend | None,
    *,
    train_samples: int,
    validation_samples: int,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
) -> tuple[TokenWindows | None, TokenWindows | None]:
    """The training and the validation dataset, of one sample or more; None for a blend of None.

    Collective: where torch.distributed is initialised every rank calls it, rank 0 builds the
    sample indices in `cache_dir`, which all ranks must see, and the others read them. Blends
    without weights are drawn from in proportion to their tokens; data smaller than the number of
    samples repeats, shuffled anew. Raises `UserError` for a bad blend, for missing or damaged
    files, and for data too small to fill one sample.
    """
    requests = [
        (split, _read_blend(blend, seq_length), num_samples)
        for split, blend, num_samples in [
            (Split.train, train, train_samples),
            (Split.valid, validation, validation_samples),
        ]
    ]
    if train is None and validation is None:
        return None, None
    cache_dir = Path(cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the index cache {cache_dir}: {error.strerror}") from error
    with _process_group(), _alone_in(cache_dir):
        if torch.distributed.get_rank() == 0:
            _remove_broken_indices(cache_dir)
        train_windows, validation_windows = (
            blend
            and _build_split(split, blend, num_samples, seq_length, seed, tokenizer, cache_dir)
            for split, blend, num_samples in requests
        )
    return train_windows, validation_windows


@dataclass(frozen=True)
class _CheckedBlend:
    """Prefixes of sound pairs, the weight of each, and the tokens that all hold together."""

    prefixes: list[str]
    weights: list[float]
    tokens: int


def _read_blend(blend: Blend | None, seq_length: int) -> _CheckedBlend | None:
    if blend is None:
        return None
    prefixes, weights = parse_blend(blend)
    tokens = [check_indexed(prefix).tokens for prefix in prefixes]
    for prefix, held in zip(prefixes, tokens):
        if held <= seq_length:
            raise UserError(
                f"{prefix} holds {held} tokens, too few for one sample of {seq_length} + 1; "
                "give more text or a smaller seq_length"
            )
    return _CheckedBlend(prefixes, weights or tokens, sum(tokens))


def _build_split(
    split: Split,
    blend: _CheckedBlend,
    num_samples: int,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: Path,
) -> TokenWindows:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(blend.prefixes, blend.weights) if s is split else None for s in Split],
        path_to_cache=str(cache_dir),
        mid_level_dataset_surplus=_surplus(blend.weights, num_samples),
        tokenizer=_tokenizer_stand_in(tokenizer, blend.prefixes),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [num_samples if s is split else None for s in Split]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    try:
        samples = builder.build()[split.value]
    except Exception as error:
        # megatron-core's own words name an attribute of one of its classes.
        if not isinstance(error.__cause__, OSError):
            raise
        reason = error.__cause__.strerror
        raise UserError(f"cannot write the index cache {cache_dir}: {reason}") from error
    return TokenWindows(samples, num_samples, epochs=num_samples * seq_length / blend.tokens)


def _surplus(weights: Sequence[float], num_samples: int) -> float:
    """The part of its samples that each dataset of a blend needs beyond its share.

    The builder rounds every share up to whole samples, then mixes the rounded sum by the weights:
    each dataset must have what that comes to, and one to spare. megatron-core's own margin, 0.005,
    is too small for few samples.
    """
    shares = [weight / sum(weights) for weight in weights]
    parts = [math.ceil(num_samples * share) for share in shares]
    return max(0.005, *((w * sum(parts) + 1) / part - 1 for w, part in zip(shares, parts)))


def parse_blend(blend: Blend) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a blend; None for the weights where it gives none."""
    entries = [blend] if isinstance(blend, str) else list(blend)
    if entries and all(isinstance(entry, str) for entry in entries):
        return entries, None
    weights, prefixes = entries[0::2], entries[1::2]
    if (
        not entries
        or len(weights) != len(prefixes)
        or not all(isinstance(prefix, str) for prefix in prefixes)
        or not all(isinstance(w, int | float) and 0 < w < math.inf for w in weights)
    ):
        raise UserError(
            f"the data blend {entries} is neither a list of prefixes nor positive weights and "
            'prefixes by turns, such as [0.3, "a", 0.7, "b"]'
        )
    return prefixes, [float(weight) for weight in weights]


@dataclass(frozen=True)
class _TokenizerStandIn:
    """What GPTDataset asks of a tokenizer. `pad` is no token id: packed samples hold no padding,
    and GPTDataset would overwrite the tokens that equal it."""

    vocab_size: int
    eod: int
    unique_identifiers: dict
    pad: int = -1


def _tokenizer_stand_in(tokenizer: Tokenizer, prefixes: list[str]) -> _TokenizerStandIn:
    # megatron-core names its cached sample indices by the data's path alone. With the data's
    # fingerprint beside the tokenizer's, other data under the same path gets other indices.
    identifiers = {**tokenizer.unique_identifiers, "data": [_fingerprint(p) for p in prefixes]}
    return _TokenizerStandIn(tokenizer.vocab_size, tokenizer.eos_id, identifiers)


def _fingerprint(prefix: str) -> str:
    """Of the .idx header, the first quarter of a million lengths, and the size of the .bin."""
    with open(idx_path(prefix), "rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 20))
    digest.update(str(bin_path(prefix).stat().st_size).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone_in(cache_dir: Path) -> Iterator[None]:
    """On rank 0, which may write to the cache: while no other run does, or reads what is half
    written."""
    with contextlib.ExitStack() as stack:
        # A cache that cannot be written to is read as it is.
        with contextlib.suppress(OSError):
            if torch.distributed.get_rank() == 0:
                lock = stack.enter_context(open(cache_dir / "lock", "a"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"Waiting for another run that is at work in {cache_dir}", flush=True)
                    fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_broken_indices(cache_dir: Path) -> None:
    """Remove what a run killed in the middle of writing its indices has left behind."""
    for path in cache_dir.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """The process group there is, or one of this process alone: without one, megatron-core 0.16
    cannot build the index of a blend."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
