"""The inner loop of the TTT mixers, token by token from anywhere in a mini-batch.

Shape suffixes as in cache_ttt.py, and K mini-batch, N slots. Inside the scan tensors are
[B, H, ...] and go by their names in the maths: W, b the state at the start of a mini-batch,
gW, gb the gradients summed since, x the keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_ttt import Span

LN_EPS = 1e-6


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


def gelu_derivative(x):
    """gelu' of the tanh form, with sqrt(2/pi) rounded as in the official models."""
    c, a = 0.79788456, 0.044715
    t = torch.tanh(c * x * (1 + a * x * x))
    return x / 2 * (1 - t * t) * (c + 3 * a * c * x * x) + (1 + t) / 2


def updated_layer(q, x, G, eta, tau, W, b, gW, gb):
    """q through the layer (W, b) after the gradients of the mini-batch so far, for each token."""
    P = eta * (q @ x.mT + 1)
    return q @ W + b - tau * (q @ gW + gb) - P @ G


def added(x, G, lam, gW, gb):
    """The gradient sums with this call's tokens in them."""
    return gW + (lam * x).mT @ G, gb + (lam * G).sum(-2, keepdim=True)


def linear_step(q, x, v, lam, tau, gamma, beta, state, sums):
    """Outputs and new gradient sums of TTT-Linear, for tokens of one mini-batch."""
    W, b = state
    G = inner_gradient(x @ W + b, v - x, gamma, beta)
    Z = updated_layer(q, x, G, torch.tril(tau * lam.mT), tau, W, b, *sums)
    return q + gamma * normalise(Z)[0] + beta, added(x, G, lam, *sums)


def mlp_step(q, x, v, lam, tau, gamma, beta, state, sums):
    """Outputs and new gradient sums of TTT-MLP, for tokens of one mini-batch."""
    W1, b1, W2, b2 = state
    Z1 = x @ W1 + b1
    X2 = F.gelu(Z1, approximate="tanh")
    G2 = inner_gradient(X2 @ W2 + b2, v - x, gamma, beta)
    G1 = (G2 @ W2.mT) * gelu_derivative(Z1)
    eta = torch.tril(tau * lam.mT)
    X2bar = F.gelu(updated_layer(q, x, G1, eta, tau, W1, b1, *sums[:2]), approximate="tanh")
    Z2 = updated_layer(X2bar, X2, G2, eta, tau, W2, b2, *sums[2:])
    sums = added(x, G1, lam, *sums[:2]) + added(X2, G2, lam, *sums[2:])
    return q + gamma * normalise(Z2)[0] + beta, sums


def scan(mixer, q, k, v, lam, tau_K, gamma, beta, state, sums, span: Span):
    """Read tokens from any position on; rows may stand at different positions.

    mixer: `step` trains on tokens of a mini-batch, `close` gives the state after all of them.
    q, k, v [B, H, L, F], lam [B, H, L, 1] with zeros at padding, tau_K [K], gamma and beta
    [H, 1, F]. Returns the outputs [B, H, L, F] and the new state and sums.

    The tokens are laid into slots of whole mini-batches. A slot without a token has lam 0, so it
    adds nothing to the sums; a row's state moves on where its last slot has one.
    """
    K, L = len(tau_K), span.length
    offset_B = span.start_B % K
    if L == 1:
        slots_BN = offset_B[:, None]
    else:
        slots = -(-(int(offset_B.max()) + L) // K) * K
        slots_BN = torch.arange(slots, device="cpu").expand(len(offset_B), -1)
    token_BN = slots_BN - offset_B[:, None]
    held_BN = (token_BN >= 0) & (token_BN < span.lengths_B[:, None])
    closing_BN = held_BN & (slots_BN % K == K - 1)
    moved_over = L > 1 and (offset_B.any() or slots_BN.shape[1] != L)
    if moved_over:
        index_BN = token_BN.clamp(0, L - 1)
        q, k, v, lam = (gather_tokens(x, index_BN) for x in (q, k, v, lam))
    lam = lam * held_BN.to(q.device)[:, None, :, None]
    tau_BN = tau_K[(slots_BN % K).to(q.device)][:, None, :, None]

    outputs = []
    for start in range(0, q.shape[2], K):
        part = slice(start, start + K)
        tokens = (x[:, :, part] for x in (q, k, v, lam, tau_BN))
        output, sums = mixer.step(*tokens, gamma, beta, state, sums)
        outputs.append(output)
        closing_B = closing_BN[:, part].any(1)
        if closing_B.any():
            moved = closing_B.to(output.device)[:, None, None, None]
            closed = mixer.close(state, tuple(tau_K[-1] * S for S in sums))
            state = tuple(torch.where(moved, new, W) for new, W in zip(closed, state))
            sums = tuple(torch.where(moved, 0, S) for S in sums)
    output = torch.cat(outputs, dim=2)
    if moved_over:
        output = gather_tokens(output, offset_B[:, None] + torch.arange(L, device="cpu"))
    return output, state, sums


def gather_tokens(x_BHLF: Tensor, index_BN: Tensor) -> Tensor:
    """[B, H, L, F] -> [B, H, N, F], each row's tokens of the indices given for it."""
    index = index_BN.to(x_BHLF.device)[:, None, :, None]
    return x_BHLF.gather(2, index.expand(*x_BHLF.shape[:2], -1, x_BHLF.shape[3]))
