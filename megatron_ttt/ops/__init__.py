"""The TTT inner loop as a pure function of tensors (arXiv 2407.04620, section 2).

    output, final_state = ttt_scan(q, k, v, lam, tau, gamma, beta, state)

`naive.py` reads like the maths and is the oracle; `scan.py` is the fast form in plain PyTorch.
"""

from functools import reduce

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
    """Run TTT-Linear or TTT-MLP over sequences of any length, one gradient step per mini-batch.

    Sizes: B batch, H heads, L sequence, F head dim, M hidden width of TTT-MLP, K mini-batch.

    Args:
        q_BHLF, k_BHLF, v_BHLF: queries, keys (both after RoPE) and values.
        lam_BHL: the keys' share of the inner learning rate, base_lr * sigmoid(...) / F.
        tau_K: the positions' share, max(1/i + delta_i, 0); its length is the mini-batch size.
        gamma_HF, beta_HF: weight and bias of the inner LayerNorm.
        state: what the inner model starts from. TTT-Linear: W [F, F] and b [1, F]; TTT-MLP: W1
            [F, M], b1 [1, M], W2 [M, F] and b2 [1, F]. Each has leading dimensions [H] (shared by
            the batch) or [B, H].
        backend: "naive" (autograd through a loop), "torch" (its own backward) or "auto".

    Returns:
        The outputs [B, H, L, F], q + LN(Zbar) with its affine part, in q's dtype, and the state
        after the last full mini-batch, per batch and head. A ragged last mini-batch is answered
        but leaves the state alone.

    State, statistics and arithmetic are in float32, or in float64 if any argument is; gradients
    come back in their argument's dtype. Only "naive" can be differentiated twice.

    Raises:
        ValueError: unknown backend, or a state of neither two nor four tensors.
    """
    if backend == "auto":
        backend = "torch"
    if backend not in BACKENDS:
        choices = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown ttt_scan backend {backend!r}: choose one of {choices}")
    if len(state) not in (2, 4):
        raise ValueError(f"state has {len(state)} tensors: give (W, b) or (W1, b1, W2, b2)")
    inputs = q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF
    dtype = reduce(torch.promote_types, (x.dtype for x in (*inputs, *state)), torch.float32)
    heads = q_BHLF.shape[:2]
    state = tuple(W.to(dtype).expand(*heads, *W.shape[-2:]) for W in state)
    with torch.autocast(q_BHLF.device.type, enabled=False):
        return BACKENDS[backend](*inputs, state)
