"""What a TTT mixer costs: FLOPs, bytes saved for the backward pass, bytes sent.

The lists follow the code tensor by tensor; `benchmarks/memory_estimate.py` compares their sum with
a process that trains.
"""

from __future__ import annotations

from megatron_ttt.mixers.base import Dimensions, Microbatch
from megatron_ttt.mixers.ttt.inner_model import CHECKPOINT_INTERVAL, InnerModel
from megatron_ttt.mixers.ttt.options import TTTOptions


def flops_per_token(inner_model: InnerModel, dims: Dimensions, options: TTTOptions) -> float:
    """Return the FLOPs of projections and scan, forward."""
    D, F, K = dims.hidden_size, dims.head_dim, options.mini_batch_size
    of_F, of_K = inner_model.flops
    scan = D * (of_F * F + of_K * K)
    return scan + 2 * (len(options.projections) + 1) * D * D


def saved_bytes(options: TTTOptions, batch: Microbatch) -> list[float]:
    """Return the bytes of each tensor saved, but for the scan's. On a GPU convolutions and gate run
    in kernels that save their inputs alone (ops/fused.py)."""
    w, columns = batch.width, batch.columns
    saved = [w * len(options.projections) * columns]  # q, k, v or q, v, gate
    saved += [w * columns, w * columns]  # q and k, rotated
    saved += [w * batch.whole]  # into the projection, gathered
    if w == 2:
        saved += [4 * batch.whole]  # into the learning-rate gate
    saved += [w * columns, w * columns]  # into the post-norm, into the output projection
    if options.pre_conv:
        if batch.on_cpu or batch.sequence_parallel:
            saved += [*batch.saved_by_norm(), 4 * batch.rows]  # its norm, the padded input
        else:
            saved += [w * batch.rows]
    if batch.on_cpu and options.share_qk:
        saved += [4 * columns, 4 * columns]  # the padded inputs of conv_q and conv_k
    if batch.on_cpu and options.use_gate:
        saved += [w * columns, w * columns]  # gelu of the gate, and what it multiplies
    return saved


def saved_state_bytes(inner_model: InnerModel, options: TTTOptions, batch: Microbatch) -> float:
    """Return the bytes that the scan saves: inner states, inner outputs and hidden layers."""
    linear = inner_model.name == "linear"
    f, K, backend = batch.dims.head_dim, options.mini_batch_size, batch.backend
    heads = batch.sequences * batch.dims.num_heads / batch.tp
    interval = CHECKPOINT_INTERVAL
    if batch.on_cpu and backend in ("auto", "cpp"):
        E, P = 16 * -(-f // 16), 16 * -(-K // 16)
        token = 4 * 2 * E + (0 if linear else 4 * 8 * f * P / K)  # Z, Zbar; Z1, Z1bar
        state = (f + 1) * E if linear else (8 * f + 1) * E
    elif not batch.on_cpu and backend in ("auto", "triton") and _fits_kernels(f, K):
        w = batch.width
        token = w * f if linear else w * 9 * f + 4 * (2 * f + K)  # G; X2, G1, G2, Z2, Zbar2, S2
        state = f * f + f if linear else 8 * f * f + 5 * f
    else:
        padded = 8 * (f // 8 + 1)
        token = 4 * (2 * f + 4)  # Z, Zbar and their statistics
        token += 0 if linear else 4 * (8 * f + K)  # Z1, Z1bar, S2
        state = padded * f if linear else padded * 4 * f + 8 * (4 * f // 8 + 1) * f
        interval = inner_model.workspace.SIZE
    return heads * (batch.seq_length * token + -(-batch.seq_length // (interval * K)) * 4 * state)


def _fits_kernels(head_dim: int, mini_batch_size: int) -> bool:
    return 16 <= head_dim <= 128 and mini_batch_size in (16, 32, 64)


def sent_bytes(batch: Microbatch) -> float:
    """Return the bytes that tensor parallelism gathers and reduces: input and output, forward and
    backward, and the post-norm's two float32 numbers a token, gathered and all-reduced."""
    return 4 * batch.width * batch.whole + 4 * 2 * batch.tokens * (batch.tp + 2)
