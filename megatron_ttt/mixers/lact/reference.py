"""The LaCT scan as its paper writes it (arXiv 2505.23884): one chunk after another.

The fast form is tested against this one, which reads like the maths and works in any floating
dtype.

Sizes: B batch, H fast heads, L sequence, C chunk, F width of a fast head, M its hidden width. The
fast weights W = (W0 [M, F], W1 [F, M], W2 [M, F]) are the function x -> W1 (silu(W0 x) * W2 x).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients of the iterations, one triple each."""


def reference_scan(
    q_BHLF: Tensor,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lr_BHL3: Tensor,
    beta_BHL: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    chunk_size: int,
    muon: bool = False,
    pre_norm: bool = False,
) -> Tensor:
    """As `lact_scan`, in float32, or in float64 if any argument is."""
    arguments = [q_BHLF, k_BHLF, v_BHLF, lr_BHL3, *weights]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in arguments) else torch.float32
    q, k, v, lr = (x.to(dtype).split(chunk_size, dim=2) for x in arguments[:4])
    W = main = tuple(w.to(dtype).expand(len(q_BHLF), *w.shape[-3:]) for w in weights)
    norms = [w.norm(dim=-1, keepdim=True) for w in W]
    moments = None
    outputs = [apply(q[0], *W)]
    for i in range(1, len(q)):
        dW = gradients(k[i - 1], v[i - 1], lr[i - 1], *W)
        if beta_BHL is not None:
            share = beta_BHL.split(chunk_size, dim=2)[i - 1].contiguous().mean(-1)
            share = share[..., None, None]
            if moments is not None:
                dW = [d + share * M for d, M in zip(dW, moments)]
            moments = dW
        if muon:
            dW = [newton_schulz(d) for d in dW]
        main = [w + d for w, d in zip(main if pre_norm else W, dW)]
        W = [normalised(w, n) for w, n in zip(main, norms)]
        outputs.append(apply(q[i], *W))
    return torch.cat(outputs, dim=2).to(q_BHLF.dtype)


def apply(x, W0, W1, W2):
    """The fast weights' function of the rows of x."""
    return (F.silu(x @ W0.mT) * (x @ W2.mT)) @ W1.mT


def gradients(k, v, lr, W0, W1, W2):
    """The sum over tokens of rate times gradient of <f(k), v>, for each of W0, W1 and W2."""
    lr0, lr1, lr2 = lr.split(1, dim=-1)
    g, u = k @ W0.mT, k @ W2.mT
    hidden, d_hidden = F.silu(g) * u, v @ W1
    sigma = torch.sigmoid(g)
    d_silu = sigma * (1 + g * (1 - sigma))
    return (
        (d_hidden * u * d_silu).mT @ (lr0 * k),
        v.mT @ (lr1 * hidden),
        (d_hidden * F.silu(g)).mT @ (lr2 * k),
    )


def normalised(W, norms):
    """W with its rows scaled to these norms."""
    return W / (W.norm(dim=-1, keepdim=True) + NORM_EPS) * norms


def newton_schulz(G: Tensor) -> Tensor:
    """Return nearly the orthogonal matrix U V^T of G = U S V^T, for matrices [..., a, b].

    The iterations run in bfloat16 on CUDA and in float32 on a CPU, in float64 on either if G is.
    """
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if G.dtype != torch.float64 and G.is_cuda:
        X = X.bfloat16()
    is_tall = G.shape[-2] > G.shape[-1]
    X = X.mT if is_tall else X
    for p, q, r in NEWTON_SCHULZ:
        A = X @ X.mT
        X = p * X + (q * A + r * A @ A) @ X
    return (X.mT if is_tall else X).to(G.dtype)
