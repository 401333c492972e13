"""What the inner loop does while it reads: its losses, step sizes and state, for people to look at.

The scan is run once more, mini-batch by mini-batch as in `reference.py`, without gradients and
without what only the outputs need. The definitions of the losses are those of the official JAX
trainer.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N full mini-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ttt.mixers.inner_loop import InnerStatistics
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.reference import expand_state, normalise


@torch.no_grad()
def inner_statistics(
    model: InnerModel,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lam_BHL: Tensor,
    tau_K: Tensor,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    state: tuple[Tensor, ...],
    k_unrotated_BHLF: Tensor,
) -> InnerStatistics:
    """The statistics of one scan, whose inputs are named as `ttt_scan`'s; time is linear in L.

    k_unrotated_BHLF: the keys before RoPE, which target_var is defined on. Computed in float32, or
    float64 if any argument is. A sequence shorter than a mini-batch has no losses (N = 0).
    """
    state = expand_state(state, (k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF))
    dtype, K, N = state[0].dtype, len(tau_K), k_BHLF.shape[2] // len(tau_K)
    tau = tau_K.to(dtype)
    gamma, beta = (x.to(dtype).unsqueeze(-2) for x in (gamma_HF, beta_HF))
    initial = state

    losses = tau.new_empty(3, N)
    tokens = (k_BHLF, v_BHLF, lam_BHL.unsqueeze(-1))
    for i in range(N):
        x, v, lam = (t[:, :, i * K : (i + 1) * K].to(dtype) for t in tokens)
        before, state = state, model.mini_batch(x, x, v, lam, tau, gamma, beta, state)[1]
        last, target = x[:, :, -1:], (v - x)[:, :, -1:]
        for kind, W in enumerate((initial, before, state)):
            prediction = gamma * normalise(model.predict(last, W))[0] + beta
            losses[kind, i] = (prediction - target).square().mean()

    target = v_BHLF.to(dtype) - k_unrotated_BHLF.to(dtype)
    spread = (target - target.mean(2, keepdim=True))[:, :, : N * K : K]
    checked = (k_BHLF, v_BHLF, *state)
    finite = sum(t.isfinite().sum() for t in checked) / sum(t.numel() for t in checked)
    return InnerStatistics(
        *losses,
        target_var=spread.square().mean((0, 1, 3)),
        inner_lr=lam_BHL.to(dtype).mean(),
        token_scale=tau.mean(),
        token_scale_clamped=(tau == 0).to(dtype).mean(),
        state_norm=state_norm(state),
        state_norm_init=state_norm(initial),
        finite=finite.to(dtype),
    )


def state_norm(state: tuple[Tensor, ...]) -> Tensor:
    """The norm of the weight matrices together, the mean over batch and heads."""
    return sum(W.square().sum((-2, -1)) for W in state[::2]).sqrt().mean()
