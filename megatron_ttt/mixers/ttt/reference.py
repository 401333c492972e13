"""The TTT scan as the paper writes it: one mini-batch after another, gradients by autograd.

Every other form is tested against this one. It reads like the maths and works in any floating
dtype, and pays for both with a Python loop of small operations that autograd records one by one.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N mini-batches. Below the entry all
tensors are [B, H, ...] and go by their names in the maths; x is a mini-batch's keys.
"""

from functools import reduce

import torch
from torch import Tensor

from megatron_ttt.mixers.ttt.inner_model import InnerModel

LN_EPS = 1e-6


def expand_state(state: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state [B, H, ...] in the dtype to compute in: float32, or float64 if any tensor is.

    inputs: the scan's other tensors, [B, H, ...] the first of them.
    """
    dtype = reduce(torch.promote_types, (x.dtype for x in (*inputs, *state)), torch.float32)
    return tuple(W.to(dtype).expand(*inputs[0].shape[:2], *W.shape[-2:]) for W in state)


def reference_scan(
    model: InnerModel,
    q_BHLF: Tensor,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lam_BHL: Tensor,
    tau_K: Tensor,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `ttt_scan`, with the state [B, H, ...] in the dtype to compute in."""
    dtype = state[0].dtype
    tau = tau_K.to(dtype)
    gamma, beta = (x.to(dtype).unsqueeze(-2) for x in (gamma_HF, beta_HF))
    tokens = [x.to(dtype) for x in (q_BHLF, k_BHLF, v_BHLF, lam_BHL.unsqueeze(-1))]
    N, r = divmod(q_BHLF.shape[2], len(tau_K))
    outputs = []

    # [N, B, H, K, ...]: x[i] is a mini-batch.
    whole = (x[:, :, : N * len(tau)] for x in tokens)
    q, k, v, lam = (x.unflatten(2, (N, len(tau))).movedim(2, 0) for x in whole)
    for i in range(N):
        output, state = model.mini_batch(q[i], k[i], v[i], lam[i], tau, gamma, beta, state)
        outputs.append(output)

    if r > 0:
        q, k, v, lam = (x[:, :, -r:] for x in tokens)
        outputs.append(model.mini_batch(q, k, v, lam, tau[:r], gamma, beta, state)[0])
    return torch.cat(outputs, dim=2).to(q_BHLF.dtype), state


def inner_gradient(Z, target, gamma, beta):
    """d/dZ of 1/2 ||gamma LN(Z) + beta - target||^2."""
    Z_hat, s = normalise(Z)
    u = gamma * (gamma * Z_hat + beta - target)
    return (u - u.mean(-1, keepdim=True) - Z_hat * (u * Z_hat).mean(-1, keepdim=True)) / s


def normalise(Z):
    """LayerNorm without its affine part, and the s it divides by."""
    centred = Z - Z.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + LN_EPS).sqrt()
    return centred / s, s


def learning_rates(tau, lam):
    """eta_ij = tau_i lam_j for j <= i, the rate at which token j's gradient reaches token i."""
    return torch.tril(tau[:, None] * lam.mT)


def step(x, G, lam, tau, W, b):
    """The state after all tokens' gradients."""
    rate = tau[-1] * lam
    return W - (rate * x).mT @ G, b - (rate * G).sum(-2, keepdim=True)
