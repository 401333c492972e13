"""The fast LaCT scan: large products alone, and memory for the backward pass linear in length.

Each chunk keeps the fast weights it starts from and computes the rest anew in its backward pass, so
one chunk's intermediate results are in memory at a time. W0 and W2 multiply the same tokens, in one
product.

Sizes: B batch, H fast heads, L sequence, C chunk, F width of a fast head, M its hidden width, A
pairs of batch and head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ttt.mixers.lact.reference import newton_schulz, normalised


def lact_scan(
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
    """Run the fast weights over sequences of any length: each chunk is answered, then learned.

    Args:
        q_BHLF, k_BHLF, v_BHLF: queries, keys and values of one floating dtype.
        lr_BHL3: each token's learning rates of W0, W1 and W2.
        beta_BHL: each token's share of the momentum that is carried on; None without momentum.
        weights: W0 [H, M, F], W1 [H, F, M] and W2 [H, M, F] that every sequence starts from.
        chunk_size: tokens C of an update. The last chunk, whole or not, is answered alone.
        muon: orthogonalise the updates (see `newton_schulz`).
        pre_norm: add updates to a copy of the weights that is not normalised.

    Returns:
        The outputs [B, H, L, F] in q's dtype. Products are computed in it; fast weights, momentum
        and their sums in float32, or in float64 where q is.
    """
    B, H, L, _ = q_BHLF.shape
    dtype = torch.promote_types(q_BHLF.dtype, torch.float32)
    W = tuple(w.to(dtype).repeat(B, 1, 1) for w in weights)
    norms = tuple(w.norm(dim=-1, keepdim=True) for w in W)
    state = (*W, *(W if pre_norm else ()))
    tokens = [x.flatten(0, 1) for x in (q_BHLF, k_BHLF, v_BHLF, lr_BHL3.to(dtype))]
    means = None
    if beta_BHL is not None and chunk_size < L:
        whole = beta_BHL[:, :, : L // chunk_size * chunk_size]
        means = whole.flatten(0, 1).unflatten(1, (-1, chunk_size)).contiguous().mean(-1)
        state = (*state, *(torch.zeros_like(w) for w in W))
    outputs = []
    for start in range(0, L, chunk_size):
        q, k, v, lr = (x[:, start : start + chunk_size] for x in tokens)
        if start + chunk_size >= L:
            outputs.append(checkpointed(answer, q, *state[:3]))
            break
        beta = None if means is None else means[:, start // chunk_size, None, None]
        output, *state = checkpointed(
            answer_and_learn, muon, pre_norm, (q, k, v, lr, beta), norms, tuple(state)
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1).unflatten(0, (B, H))


def checkpointed(function, *arguments):
    """Call a function whose intermediate results are computed again in its backward pass."""
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",
    )


def answer(q: Tensor, W0: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Return the fast weights' function of the queries [A, C, F]."""
    g, u = torch.bmm(q, stacked(W0, W2, q.dtype).mT).chunk(2, dim=-1)
    return torch.bmm(F.silu(g) * u, W1.to(q.dtype).mT)


def stacked(W0: Tensor, W2: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of W0, then those of W2."""
    return torch.cat([W0.to(dtype), W2.to(dtype)], dim=1)


def answer_and_learn(muon: bool, pre_norm: bool, tokens, norms, state):
    """Return the outputs of a chunk, and the state after it: the weights, their main copy with
    `pre_norm`, and the momentum where there is any."""
    q, k, v, lr, beta = tokens
    W = state[:3]
    output = answer(q, *W)
    dW = learning_step(k, v, lr, *W)
    if beta is not None:
        dW = [d + beta * M for d, M in zip(dW, state[-3:])]
    moments = () if beta is None else dW
    if muon:
        dW = [newton_schulz(d) for d in dW]
    main = [w + d for w, d in zip(state[3:6] if pre_norm else W, dW)]
    W = [normalised(w, n) for w, n in zip(main, norms)]
    return (output, *W, *(main if pre_norm else ()), *moments)


def learning_step(k: Tensor, v: Tensor, lr: Tensor, W0: Tensor, W1: Tensor, W2: Tensor):
    """Return what the tokens add to W0, W1 and W2, in the weights' dtype."""
    dtype = k.dtype
    g, u = torch.bmm(k, stacked(W0, W2, dtype).mT).chunk(2, dim=-1)
    d_hidden = torch.bmm(v, W1.to(dtype))
    lr0, lr1, lr2 = lr.to(dtype).split(1, dim=-1)
    sigma = torch.sigmoid(g)
    activated = g * sigma
    d_g = d_hidden * u * (sigma + activated * (1 - sigma)) * lr0
    d_u = d_hidden * activated * lr2
    d0, d2 = torch.bmm(torch.cat([d_g, d_u], dim=-1).mT, k).chunk(2, dim=1)
    d1 = torch.bmm(v.mT, activated * u * lr1)
    return [d.to(W0.dtype) for d in (d0, d1, d2)]
