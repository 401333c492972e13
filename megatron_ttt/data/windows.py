"""The windows of one dataset, epoch after epoch.

Shapes: L is seq_length, T the dataset's tokens. Each epoch shuffles all documents anew and appends
them to one long stream; window n holds the L + 1 tokens from n * L on, so that it begins with the
last token of the one before. Windows belong to the epoch in which they end, and are shuffled within
it. An epoch depends on the seed and its own number alone: what is drawn from it stays the same when
more epochs are asked for. The first epoch is the one that megatron-core's GPTDataset draws.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers

from megatron_ttt.data.index_cache import load_arrays
from megatron_ttt.data.indexed import Index, bin_path


def windows_in(epochs: int, tokens: int, seq_length: int) -> int:
    """The windows of so many epochs of a dataset."""
    return (epochs * tokens - 1) // seq_length


def epochs_for(windows: int, tokens: int, seq_length: int) -> int:
    """The least number of epochs that have so many windows, 1 or more."""
    return max(1, -(-(windows * seq_length + 1) // tokens))


def draw_epochs(
    lengths: np.ndarray, epochs: int, seq_length: int, seed: int
) -> dict[str, np.ndarray]:
    """The order of documents and windows; lengths: tokens of each document, int32 [documents].

    documents: int32 [epochs * documents], the stream. bounds: [windows + 1, 2], where each window
    begins: a place in `documents` and an offset in that document. order: [windows], which window is
    drawn when.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    windows = windows_in(epochs, tokens, seq_length)
    documents = np.empty((epochs, len(lengths)), np.int32)
    order = np.arange(windows, dtype=np.uint32 if windows < 2**32 - 1 else np.int64)
    first = 0
    for epoch in range(epochs):
        random = np.random.RandomState([seed, epoch] if epoch else seed)
        documents[epoch] = np.arange(len(lengths))
        random.shuffle(documents[epoch])
        last = windows_in(epoch + 1, tokens, seq_length)
        random.shuffle(order[first:last])
        first = last
    stream = documents.ravel()
    bounds = helpers.build_sample_idx(np.array(lengths), stream, seq_length, epochs, tokens)
    return {"documents": stream, "bounds": bounds, "order": order}


class Windows:
    """Reads the windows of a dataset in the order that `draw_epochs` has left in a cache's entry.

    Other processes are sent the names of the files and map them again.
    """

    def __init__(self, prefix: str, entry: Path) -> None:
        self._arguments = prefix, entry
        self.path = bin_path(prefix)
        self._index = Index(prefix)
        # As a plain array: slices of a memmap are several times slower.
        self._tokens = np.asarray(np.memmap(self.path, self._index.dtype, "r"))
        arrays = load_arrays(entry, "documents", "bounds", "order")
        self._documents, self._bounds, self._order = arrays

    def __reduce__(self):
        return type(self), self._arguments

    def __getitem__(self, number: int) -> np.ndarray:
        """The window that is drawn as `number`, int64 [L + 1]."""
        parts = [self._tokens[start:stop] for start, stop in self._pieces(number)]
        return np.concatenate(parts, dtype=np.int64)

    def place(self, number: int, column: int) -> int:
        """Where a token of that window stands in the .bin, counted in tokens."""
        for start, stop in self._pieces(number):
            if column < stop - start:
                return start + column
            column -= stop - start
        raise IndexError(f"no such column in window {number}")

    def _pieces(self, number: int) -> list[tuple[int, int]]:
        """Where the pieces of a window begin and end in the .bin, counted in tokens."""
        window = int(self._order[number])
        (first, offset), (last, end) = self._bounds[window : window + 2].tolist()
        documents = self._documents[first : last + 1]
        starts = self._index.offsets[documents] // self._index.dtype.itemsize
        stops = starts + self._index.lengths[documents]
        stops[-1] = starts[-1] + end + 1
        starts[0] += offset
        return list(zip(starts.tolist(), stops.tolist()))
