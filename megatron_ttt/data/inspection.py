"""Looking at finished datasets: what they are made of, how long their documents are, their text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttt.data.build import open_run, run_tokenizer
from megatron_ttt.data.indexed import check_ids
from megatron_ttt.data.verification import check_index
from megatron_ttt.errors import UserError


def stats(output_prefix: str, plot: str | None = None) -> str:
    """Documents, tokens and lengths of every dataset, as JSON; `plot` names a PNG to draw.

    Raises `UserError` for an index that is not sound. The quantiles are exact; memory grows with
    the longest document, not with their number.
    """
    final, datasets = open_run(output_prefix)
    totals = final["totals"]
    report: dict[str, Any] = {
        "shards": len(final["shards"]),
        "text_bytes": totals["text_bytes"],
        "tokens_per_byte": totals["tokens"] / max(1, totals["text_bytes"]),
        "malformed": totals["malformed"],
        "skipped_shards": totals["skipped_shards"],
        "datasets": {},
    }
    histograms = {}
    for dataset in datasets:
        check_index(dataset)
        counts = np.zeros(1, np.int64)
        for lengths in dataset.index.tokens_per_document():
            chunk = np.bincount(lengths, minlength=len(counts))
            chunk[: len(counts)] += counts
            counts = chunk
        name = Path(dataset.prefix).name
        histograms[name] = counts
        report["datasets"][name] = _describe(counts) | {"dtype": dataset.index.dtype.name}
    if plot:
        _draw(histograms, plot)
    return json.dumps(report, indent=1)


def _describe(counts: np.ndarray) -> dict:
    """`counts[n]` documents have n tokens."""
    documents, tokens = int(counts.sum()), int((counts * np.arange(len(counts))).sum())
    below = np.cumsum(counts)
    quantiles = {
        name: int(np.searchsorted(below, max(1, np.ceil(share * documents))))
        for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    }
    return {
        "documents": documents,
        "empty": int(counts[0]),
        "tokens": tokens,
        "mean_length": round(tokens / documents, 1),
        "min_length": int(np.flatnonzero(counts)[0]),
    } | quantiles


def _draw(histograms: dict[str, np.ndarray], plot: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("--plot needs the package matplotlib: pip install matplotlib") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    longest = max(map(len, histograms.values()))
    edges = np.unique(np.geomspace(1, max(2, longest), 60).astype(int))
    for name, counts in histograms.items():
        lengths = np.arange(len(counts))
        left.stairs(np.histogram(lengths, edges, weights=counts)[0], edges, label=name)
        tokens = np.cumsum(counts * lengths)
        right.plot(np.maximum(lengths, 1), tokens / tokens[-1], label=name)
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    right.set(xscale="log", xlabel="tokens in a document", ylabel="share of tokens in shorter ones")
    left.legend(fontsize="small")
    try:
        figure.savefig(plot, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {plot}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def peek(
    output_prefix: str, tokenizer_model: str | None = None, first: int = 0, count: int = 3
) -> Iterator[str]:
    """Some documents of every dataset, decoded, each under a line that says what it is.

    Raises `UserError` for an index that is not sound, and for ids outside the vocabulary.
    """
    final, datasets = open_run(output_prefix)
    tokenizer = run_tokenizer(final, tokenizer_model)
    longest = max(datasets, key=lambda dataset: dataset.documents)
    if not 0 <= first < longest.documents:
        raise UserError(
            f"--first is {first}; {longest.prefix} has documents 0..{longest.documents - 1}"
        )
    for dataset in datasets:
        check_index(dataset)
    for dataset in datasets:
        documents = dataset.documents
        if first >= documents:
            yield f"--- {Path(dataset.prefix).name}: no document {first}, it has {documents}"
        for number in range(first, min(first + count, documents)):
            ids = dataset.document(number)
            if len(ids):
                check_ids(dataset.prefix, ids, tokenizer.vocab_size)
            yield f"--- {Path(dataset.prefix).name}: document {number}, {len(ids)} tokens"
            yield tokenizer.decode(ids.tolist())
