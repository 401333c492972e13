"""A blend: datasets by their prefixes, and how much is taken from each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_ttt.data.indexed import open_indexed
from megatron_ttt.errors import UserError

Blend = str | Sequence[str | float]
"""A prefix, a list of prefixes, or weights and prefixes by turns: [0.3, "a", 0.7, "b"]. A weight
may be a number or its text."""


def parse_blend(blend: Blend) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a blend; None for the weights where it gives none.

    A prefix that is named twice counts once, with the sum of its weights: its samples would
    otherwise be drawn once for each name. Raises `UserError` for anything but a blend.
    """
    entries = [blend] if isinstance(blend, str) else list(blend)
    if len(entries) > 1 and _number(entries[0]) is not None:
        weights, prefixes = [_number(entry) for entry in entries[0::2]], entries[1::2]
    else:
        weights, prefixes = None, entries
    if (
        not prefixes
        or not all(isinstance(prefix, str) for prefix in prefixes)
        or (weights is not None and len(weights) != len(prefixes))
        or not all(weight is not None and 0 < weight < math.inf for weight in weights or ())
    ):
        raise UserError(
            f"the data blend {entries} is neither a list of prefixes nor positive weights and "
            'prefixes by turns, such as [0.3, "a", 0.7, "b"]'
        )
    if weights is None:
        return list(dict.fromkeys(prefixes)), None
    sums = dict.fromkeys(prefixes, 0.0)
    for prefix, weight in zip(prefixes, weights):
        sums[prefix] += weight
    return list(sums), list(sums.values())


def times_read(blend: Blend, num_samples: int, seq_length: int) -> dict[str, float]:
    """How often `num_samples` samples of a blend pass over the tokens of each of its datasets.

    Raises `UserError` for a dataset that is not there.
    """
    prefixes, weights = parse_blend(blend)
    tokens = [open_indexed(prefix).tokens for prefix in prefixes]
    weights = weights or tokens
    wanted = num_samples * seq_length / sum(weights)
    return {p: wanted * w / held for p, w, held in zip(prefixes, weights, tokens)}


def _number(entry: str | float) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None
