"""What a LaCT mixer costs: FLOPs, bytes saved for the backward pass, bytes sent."""

from __future__ import annotations

from megatron_ttt.mixers.base import Dimensions, Microbatch
from megatron_ttt.mixers.lact.options import LaCTOptions
from megatron_ttt.mixers.lact.parameters import fast_sizes
from megatron_ttt.mixers.lact.reference import NEWTON_SCHULZ


def flops_per_token(dims: Dimensions, options: LaCTOptions, seq_length: int) -> float:
    """Return the FLOPs of projections, windowed attention, fast weights and Muon, forward.

    The fast weights are counted as by the authors, 18 f h a head: every chunk is learned from.
    """
    D, L, m = dims.hidden_size, seq_length, options.fast_heads
    f, h = fast_sizes(dims, options)
    gates = 2 * D * m * (3 + options.momentum + options.output_scale)
    window = min(options.window, L)
    seen = (window * (window + 1) / 2 + (L - window) * window) / L  # tokens, on average
    small, large = sorted((f, h))
    step = len(NEWTON_SCHULZ) * (4 * small * small * large + 2 * small**3)
    muon = 3 * m * step / options.chunk_size if options.muon else 0
    return 8 * D * D + gates + 4 * D * seen + 18 * f * h * m + muon


def saved_bytes(options: LaCTOptions, batch: Microbatch) -> list[float]:
    """Return the bytes of each tensor saved, but for the chunks' states."""
    w, columns = batch.width, batch.columns
    saved = [w * batch.whole, w * 3 * columns]  # into the projection, gathered; q, k, v
    if w == 2:
        saved += [4 * batch.whole]  # into the gates
    saved += [w * columns] * 3  # q and k, rotated; the attention's output
    # The fast queries and keys: scaled and shifted, normalised, rotated; then the values.
    each = [4 * columns] * (1 + options.silu + options.fast_rope + (w == 2)) + [w * columns]
    saved += 2 * each + [w * columns]
    if options.qk_norm:
        saved += [4 * columns] * 2
    saved += [w * columns, 4 * columns]  # the scan's output, normalised
    return [*saved, 4 * columns, w * columns]  # scaled; into the output projection


def saved_state_bytes(options: LaCTOptions, batch: Microbatch) -> float:
    """Return the bytes of the states that chunks start from, and of the work of one chunk that its
    backward pass computes again."""
    heads = batch.sequences * options.fast_heads / batch.tp
    f, h = fast_sizes(batch.dims, options)
    chunks = -(-batch.seq_length // options.chunk_size)
    states = 1 + options.pre_norm + options.momentum
    chunk = min(options.chunk_size, batch.seq_length)
    return heads * (chunks * states * 4 * 3 * f * h + 12 * batch.width * chunk * h)


def sent_bytes(options: LaCTOptions, batch: Microbatch) -> float:
    """Return the bytes that tensor parallelism gathers and reduces: input and output, forward and
    backward, and with `qk_norm` two numbers a token, all-reduced both ways."""
    norms = 4 * 2 * 2 * 2 * batch.tokens if options.qk_norm else 0
    return 4 * batch.width * batch.whole + norms
