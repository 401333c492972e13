"""The inner loop as pure functions of tensors.

`ttt_scan` is the one entry; `naive.py` is the oracle it is tested against. Sizes in the shape
suffixes: B batch, H heads, L sequence, F head_dim, K mini-batch, M hidden width of the inner MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttt.ops.naive import naive_scan
from megatron_ttt.ops.scan import torch_scan

BACKENDS = {"naive": naive_scan, "torch": torch_scan}


def ttt_scan(
    q_BHLF: Tensor,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lam_BHL: Tensor,
    tau_K: Tensor,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    state: tuple[Tensor, ...],
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Train the inner model along the sequence and answer every token (arXiv 2407.04620, section 2).

    q, k, v: after RoPE, in float64, float32 or bfloat16. lam: inner learning rate of each key token
    (base rate, gate and 1/head_dim in it). tau: scale of each place in a mini-batch, clamped; its
    length is the mini-batch size. gamma, beta: the inner LayerNorm's. state: (W [H,F,F], b [H,1,F])
    for TTT-Linear, (W1 [H,F,M], b1 [H,1,M], W2 [H,M,F], b2 [H,1,F]) for TTT-MLP, each tensor for
    all sequences or with a batch dimension in front.

    Returns the outputs, residual q included, [B,H,L,F] in q's dtype, and the state after the last
    whole mini-batch, per batch and head. Arithmetic and state are float32, or float64 where q is.
    backend: auto takes the fastest that runs here. Raises ValueError for a backend there is not.
    """
    if backend == "auto":
        backend = "torch"
    if backend not in BACKENDS:
        raise ValueError(f"scan backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
    dtype = torch.promote_types(q_BHLF.dtype, torch.float32)
    B = len(q_BHLF)
    inputs = [x.to(dtype) for x in (q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF)]
    state = tuple(W.to(dtype).expand(B, *W.shape[-3:]) for W in state)
    out_BHLF, final_state = BACKENDS[backend](*inputs, state)
    return out_BHLF.to(q_BHLF.dtype), final_state
