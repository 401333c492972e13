"""The fast TTT scan in plain PyTorch: its own backward, linear in sequence length.

The sequence is cut into groups of mini-batches. The forward keeps the state at the start of each
group and nothing else; the backward goes through the groups from the last to the first and runs
each one forward again. `linear.py` and `mlp.py` know what happens inside a group.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N mini-batches of a group.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.linear import LinearGroup
from megatron_ttt.ops.mlp import MLPGroup

GROUP = {2: LinearGroup, 4: MLPGroup}


def torch_scan(q, k, v, lam, tau, gamma, beta, state):
    """As `ttt_scan`, with the state per batch and head."""
    output, *final_state = Scan.apply(q, k, v, lam, tau, gamma, beta, *state)
    return output, tuple(final_state)


def heads_at_once(B: int, H: int, limit: int) -> list[tuple[slice, slice]]:
    """Batches and heads in blocks of at most `limit` (batch, head) pairs, as far as H allows."""
    b, h = max(limit // H, 1), min(limit, H)
    return [
        (slice(i, i + b), slice(j, j + h)) for i in range(0, B, b) for j in range(0, H, h)
    ]


def groups(x_BHL_: Tensor, K: int, size: int) -> list[Tensor]:
    """The sequence as views [N, B, H, K, ...] of `size` mini-batches, its ragged end the last."""
    L = x_BHL_.shape[2]
    N, r = divmod(L, K)
    views = []
    if N > 0:
        views += x_BHL_[:, :, : N * K].unflatten(2, (N, K)).movedim(2, 0).split(size)
    if r > 0:
        views.append(x_BHL_[:, :, N * K :].unsqueeze(0))
    return views


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lam, tau, gamma, beta, *state):
        Group = GROUP[len(state)]
        dtype = state[0].dtype
        B, H = q.shape[:2]
        K = len(tau)
        tau_K = tau.to(dtype)
        output = torch.empty_like(q)
        Zs, Zbars = torch.empty_like(q, dtype=dtype), torch.empty_like(q, dtype=dtype)
        final_state = [torch.empty_like(W, memory_format=torch.contiguous_format) for W in state]
        ctx.blocks = heads_at_once(B, H, LIMIT)
        checkpoints = []
        for block in ctx.blocks:
            gamma_A1F, beta_A1F = (per_head(x, block, B, dtype) for x in (gamma, beta))
            carried = Group.pack(*(W[block] for W in state))
            sequence = list(zip(*(groups(x[block], K, Group.SIZE) for x in (q, k, v, lam, output, Zs, Zbars))))
            kept = [c.new_empty(len(sequence), *c.shape) for c in carried]
            checkpoints += kept
            group = None
            def store():
                for final, W in zip(final_state, Group.unpack(*carried, b, h)):
                    final[block] = W
            for g, (*inputs, out, Z, Zbar) in enumerate(sequence):
                for checkpoint, c in zip(kept, carried):
                    checkpoint[g] = c
                N, b, h, r, F = out.shape
                if r < K:
                    store()
                if group is None or group.sizes[0] != N or group.sizes[2] != r:
                    group = Group(N, b * h, r, carried)
                group.load(*inputs, tau_K[:r], gamma_A1F, beta_A1F)
                out.copy_(group.forward().unflatten(1, (b, h)))
                Z.copy_(group.Z_NAKF.unflatten(1, (b, h)))
                Zbar.copy_(group.Zbar_NAKF.unflatten(1, (b, h)))
                carried = group.state
            if r == K:
                store()
        ctx.state_like = [W.shape for W in state]
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, Zs, Zbars, *checkpoints)
        ctx.set_materialize_grads(False)
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final):
        q, k, v, lam, tau, gamma, beta, Zs, Zbars, *checkpoints = ctx.saved_tensors
        dtype = checkpoints[0].dtype
        Group = GROUP[len(d_final)]
        B, H = q.shape[:2]
        K = len(tau)
        tau_K = tau.to(dtype)
        if d_output is None:
            d_output = torch.zeros_like(q)
        d_final = [checkpoints[0].new_zeros(s) if d is None else d for d, s in zip(d_final, ctx.state_like)]
        dq, dk, dv, dlam = (torch.empty_like(x) for x in (q, k, v, lam))
        dtau, dgamma, dbeta = (torch.zeros_like(x, dtype=dtype) for x in (tau, gamma, beta))
        d_state = [torch.empty_like(d) for d in d_final]
        per_block = len(checkpoints) // len(ctx.blocks)
        for n, block in enumerate(ctx.blocks):
            gamma_A1F, beta_A1F = (per_head(x, block, B, dtype) for x in (gamma, beta))
            kept = checkpoints[n * per_block : (n + 1) * per_block]
            d_last = Group.pack(*(W[block] for W in d_final))
            d_carried = [torch.zeros_like(d) for d in d_last]
            sequence = list(zip(*(groups(x[block], K, Group.SIZE) for x in (q, k, v, lam, Zs, Zbars, d_output, dq, dk, dv, dlam))))
            group = None
            for g in reversed(range(len(sequence))):
                *inputs, Z, Zbar, d_out, dq_, dk_, dv_, dlam_ = sequence[g]
                N, b, h, r, F = d_out.shape
                state = [c[g] for c in kept]
                if group is None or group.sizes[0] != N or group.sizes[2] != r:
                    group = Group(N, b * h, r, state, d_carried)
                group.start(*state)
                group.load(*inputs, tau_K[:r], gamma_A1F, beta_A1F)
                group.Z_NAKF.unflatten(1, (b, h)).copy_(Z)
                group.Zbar_NAKF.unflatten(1, (b, h)).copy_(Zbar)
                if r == K and d_last is not None:
                    for c, a in zip(d_carried, d_last):
                        c.add_(a)
                    d_last = None
                grads = group.backward(d_out)
                for d, x in zip((dq_, dk_, dv_, dlam_), grads):
                    d.copy_(x.unflatten(1, (b, h)))
                dtau[:r] += grads[4]
                dgamma[block[1]] += grads[5].unflatten(0, (b, h)).sum(0)
                dbeta[block[1]] += grads[6].unflatten(0, (b, h)).sum(0)
            if d_last is not None:
                for c, a in zip(d_carried, d_last):
                    c.add_(a)
            for d, W in zip(d_state, Group.unpack(*d_carried, b, h)):
                d[block] = W
        grads = (dq, dk, dv, dlam, dtau.to(tau.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype))
        return *grads, *d_state


def per_head(x_HF, block, B, dtype):
    batches = len(range(B)[block[0]])
    return x_HF[block[1]].to(dtype).repeat(batches, 1).unsqueeze(1)


import os
LIMIT = int(os.environ.get("LIMIT", "1000000"))
