"""The scan through Triton kernels: what they take, and their place in autograd."""

import math
from functools import cache

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.mixers.ttt.inner_model import CHECKPOINT_INTERVAL, InnerModel
from megatron_ttt.mixers.ttt.triton.common import INTERPRETED
from megatron_ttt.ops.triton.common import padded

HEAD_DIM = range(16, 129)
MINI_BATCH = (16, 32, 64)
_SIZES = (16, 64), (32, 64), (64, 64), (16, 128), (32, 128), (64, 128)
SHARED_KIB = {
    ("linear", torch.bfloat16): dict(zip(_SIZES, (16, 20, 32, 64, 64, 80))),
    ("linear", torch.float32): dict(zip(_SIZES, (35, 57, 112, 99, 137, 226))),
    ("mlp", torch.bfloat16): dict(zip(_SIZES, (44, 64, 112, 74, 104, 152))),
    ("mlp", torch.float32): dict(zip(_SIZES, (62, 96, 176, 110, 160, 216))),
}
"""Shared memory of a backward, by operands, mini-batch and padded head_dim, on GPUs that have less
of it than an H100, where it always suffices. Compiled for sm_80 in bfloat16, in float32 for sm_90:
of three of those sizes sm_80 takes as much."""


def unsupported_reason(model, head_dim, mini_batch_size, dtype, state_dtype, device) -> str | None:
    """Return why the kernels cannot run a scan (a `ScanProblem`), None if they can."""
    if head_dim not in HEAD_DIM:
        return f"head_dim is {head_dim}: they take {HEAD_DIM[0]} to {HEAD_DIM[-1]}"
    if mini_batch_size not in MINI_BATCH:
        return f"mini_batch_size is {mini_batch_size}: they take 16, 32 or 64"
    if state_dtype != torch.float32:
        return f"they compute in float32, not {state_dtype}"
    if device != "cuda" and not INTERPRETED.value:
        return f"they need a CUDA device, not {device} (TRITON_INTERPRET=1 interprets them)"
    operands = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    needed = SHARED_KIB[model.name, operands][mini_batch_size, max(padded(head_dim), 64)]
    there = math.inf if INTERPRETED.value else shared_kib(torch.cuda.current_device())
    if needed > there:
        return (
            f"head_dim {head_dim} and mini_batch_size {mini_batch_size} in {operands} take "
            f"{needed} KiB of shared memory, this GPU has {there:.0f}"
        )
    return None


@cache
def shared_kib(device: int) -> float:
    """Shared memory that a program may have on a GPU. Every scan asks."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["max_shared_mem"] / 1024


def triton_scan(
    model: InnerModel,
    q_BHLF,
    k_BHLF,
    v_BHLF,
    lam_BHL,
    tau_K,
    gamma_HF,
    beta_HF,
    state,
    interval=CHECKPOINT_INTERVAL,
):
    """As `ttt_scan`, with the state [B, H, ...] in float32; one state kept every `interval` mini-
    batches.

    Products take bfloat16 operands if q, k and v are bfloat16, else float32 ones; all else is
    float32. Two runs agree bit for bit.
    """
    inputs = q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, *state
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    output, *final_state = Scan.apply(model, keep, interval, *inputs)
    return output, tuple(final_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, keep, interval, q, k, v, lam, tau, gamma, beta, *state):
        ctx.dtypes = [x.dtype for x in (lam, tau, gamma, beta)]
        q, k, v = map(with_adjacent_features, (q, k, v))
        lam, tau, gamma, beta = (x.float().contiguous() for x in (lam, tau, gamma, beta))
        state = [W if W[0, 0].is_contiguous() else W.contiguous() for W in state]
        forward, ctx.kernel = model.load_kernels()
        ctx.interval = interval
        with torch.cuda.device_of(q):
            output, final_state, kept = forward(
                q, k, v, lam.flatten(0, 1), tau, gamma, beta, state, interval, keep
            )
        if keep:
            ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, *state, *kept)
        ctx.state_tensors = len(state)
        ctx.set_materialize_grads(False)
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final_state):
        q, k, v, lam, tau, gamma, beta, *kept = ctx.saved_tensors
        state, kept = kept[: ctx.state_tensors], kept[ctx.state_tensors :]
        B, H = q.shape[:2]
        d_output = torch.zeros_like(q) if d_output is None else with_adjacent_features(d_output)
        d_final_state = [
            lam.new_zeros(W.shape) if d is None else d.contiguous()
            for d, W in zip(d_final_state, state)
        ]
        with torch.cuda.device_of(q):
            *d_tokens, dlam_AL, dtau_AK, dgamma_AF, dbeta_AF, d_state = ctx.kernel(
                q, k, v, lam.flatten(0, 1), tau, gamma, beta, state, kept, ctx.interval,
                d_output, d_final_state,
            )  # fmt: skip
        shared = (
            dlam_AL.unflatten(0, (B, H)),
            dtau_AK.sum(0),
            dgamma_AF.unflatten(0, (B, H)).sum(0),
            dbeta_AF.unflatten(0, (B, H)).sum(0),
        )
        shared = (d.to(dtype) for d, dtype in zip(shared, ctx.dtypes))
        return None, None, None, *d_tokens, *shared, *d_state


def with_adjacent_features(x_BHLF: Tensor) -> Tensor:
    return x_BHLF if x_BHLF.stride(-1) == 1 else x_BHLF.contiguous()
