"""The TTT scan as the paper writes it: one mini-batch after another, gradients by autograd.

This is the oracle of every other form: it reads like the maths, works in any floating dtype,
and pays for both (a Python loop of small operations, autograd over every one of them).

Sizes: B batch, H heads, L sequence, F head dim, M hidden width of the inner MLP, K mini-batch,
N mini-batches. A trailing 1 is a kept dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6
GELU_CUBIC = 0.044715


def naive_scan(
    q_BHLF: Tensor,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lam_BHL: Tensor,
    tau_K: Tensor,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All tensors in one dtype, the state per batch and head; otherwise as `ttt_scan`."""
    mini_batch = linear_mini_batch if len(state) == 2 else mlp_mini_batch
    gamma_H1F, beta_H1F = gamma_HF.unsqueeze(-2), beta_HF.unsqueeze(-2)
    K = len(tau_K)
    N = q_BHLF.shape[2] // K
    tokens = (q_BHLF, k_BHLF, v_BHLF, lam_BHL.unsqueeze(-1))

    # [N, B, H, K, ...], so that x[i] is mini-batch i.
    q, k, v, lam = (x[:, :, : N * K].unflatten(2, (N, K)).movedim(2, 0) for x in tokens)
    outputs = []
    for i in range(N):
        output, state = mini_batch(q[i], k[i], v[i], lam[i], tau_K, gamma_H1F, beta_H1F, state)
        outputs.append(output)

    q, k, v, lam = (x[:, :, N * K :] for x in tokens)
    r = q.shape[2]
    if r > 0:
        # A ragged end is answered with the state as it is; it never becomes a full mini-batch.
        output, _ = mini_batch(q, k, v, lam, tau_K[:r], gamma_H1F, beta_H1F, state)
        outputs.append(output)
    return torch.cat(outputs, dim=2), state


def linear_mini_batch(q, x, v, lam, tau_K, gamma, beta, state):
    """TTT-Linear on one mini-batch: outputs [B, H, K, F] and the next (W, b)."""
    W, b = state
    G = inner_gradient(x @ W + b, v - x, gamma, beta)
    P = causal_rates(tau_K, lam) * (q @ x.mT + 1)
    output = q + gamma * normalise(q @ W + b - P @ G)[0] + beta
    return output, step(x, G, lam, tau_K, W, b)


def mlp_mini_batch(q, x, v, lam, tau_K, gamma, beta, state):
    """TTT-MLP on one mini-batch: outputs [B, H, K, F] and the next (W1, b1, W2, b2)."""
    W1, b1, W2, b2 = state
    Z1 = x @ W1 + b1
    X2 = F.gelu(Z1, approximate="tanh")
    G2 = inner_gradient(X2 @ W2 + b2, v - x, gamma, beta)
    G1 = (G2 @ W2.mT) * gelu_derivative(Z1)

    rates = causal_rates(tau_K, lam)
    P1 = rates * (q @ x.mT + 1)
    X2bar = F.gelu(q @ W1 + b1 - P1 @ G1, approximate="tanh")
    P2 = rates * (X2bar @ X2.mT + 1)
    output = q + gamma * normalise(X2bar @ W2 + b2 - P2 @ G2)[0] + beta
    return output, step(x, G1, lam, tau_K, W1, b1) + step(X2, G2, lam, tau_K, W2, b2)


def inner_gradient(Z, target, gamma, beta):
    """d/dZ of 1/2 ||gamma*LN(Z) + beta - target||^2: LayerNorm's backward fused with the loss."""
    Z_hat, s = normalise(Z)
    u = gamma * (gamma * Z_hat + beta - target)
    return (u - u.mean(-1, keepdim=True) - Z_hat * (u * Z_hat).mean(-1, keepdim=True)) / s


def normalise(Z):
    """LayerNorm without its affine part, and the standard deviation it divides by."""
    mean = Z.mean(-1, keepdim=True)
    s = ((Z - mean).square().mean(-1, keepdim=True) + LN_EPS).sqrt()
    return (Z - mean) / s, s


def causal_rates(tau_K, lam):
    """eta_ij = tau_i * lam_j for j <= i, else 0."""
    return torch.tril(tau_K[:, None] * lam.mT)


def step(x, G, lam, tau_K, W, b):
    """The state after the mini-batch: one gradient step from (W, b) over all of its tokens."""
    rate = tau_K[-1] * lam
    return W - (rate * x).mT @ G, b - (rate * G).sum(-2, keepdim=True)


def gelu_derivative(x):
    """The official code's derivative of tanh-GELU, which rounds sqrt(2/pi) to eight digits."""
    c = 0.79788456
    t = torch.tanh(c * x * (1 + GELU_CUBIC * x * x))
    return x / 2 * (1 - t * t) * (c + 3 * GELU_CUBIC * c * x * x) + (1 + t) / 2
