"""The loss of a model that knows nothing but how frequent each token is."""

from pathlib import Path

import numpy as np

from megatron_ttt.data.indexed import bin_path, check_ids, check_indexed

_CHUNK_TOKENS = 1 << 24


def unigram_entropy(
    train_prefix: str | Path, validation_prefix: str | Path, vocab_size: int
) -> float:
    """Cross-entropy, in nats per token, of the validation tokens under the frequencies of the
    training tokens with one added to every count. A language model that learnt anything about
    the order of tokens has a lower loss. Raises `UserError` for damaged data and for an id
    outside the vocabulary."""
    train = _counts(train_prefix, vocab_size) + 1
    validation = _counts(validation_prefix, vocab_size)
    log_probabilities = np.log(train) - np.log(train.sum())
    return float(-(validation @ log_probabilities) / validation.sum())


def _counts(prefix: str | Path, vocab_size: int) -> np.ndarray:
    """How often each id occurs in the pair, int64 [vocab_size]."""
    tokens = np.memmap(bin_path(prefix), check_indexed(prefix).dtype, "r")
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        check_ids(prefix, chunk, vocab_size)
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts
