"""The fast TTT scan in plain PyTorch: the maths' own backward, linear in time and memory.

The sequence is cut into groups of mini-batches. The forward keeps the carried state at the start
of each group and nothing else; the backward walks the groups from the last to the first and runs
each one forward again. What happens inside a group is the inner model's business (`linear.py`,
`mlp.py`), which gets its tokens as contiguous blocks, mini-batch first.

Sizes: B batch, H heads, A = B * H, L sequence, F head dim, K mini-batch, N mini-batches of a
group, E = F + 1 (a constant 1 appended, so that the bias is one more row of the weights).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops import linear

INNER_MODEL = {2: linear}


class Group(NamedTuple):
    """Consecutive mini-batches: tokens start to stop, K to a mini-batch."""

    start: int
    stop: int
    K: int


class Inputs(NamedTuple):
    """A group's share of the scan's inputs."""

    qx_NA2KE: Tensor  # the queries' rows, then the keys'
    v_NAKF: Tensor
    lam_NAK: Tensor
    tau_K: Tensor
    gamma_A1F: Tensor
    beta_A1F: Tensor

    @property
    def q_NAKE(self):
        return self.qx_NA2KE[:, :, : len(self.tau_K)]

    @property
    def x_NAKE(self):
        return self.qx_NA2KE[:, :, len(self.tau_K) :]


class Workspace:
    def __init__(self, like):
        self.like = like
        self.memory = {}

    def __call__(self, name, *shape):
        numel = 1
        for n in shape:
            numel *= n
        if name not in self.memory or self.memory[name].numel() < numel:
            self.memory[name] = self.like.new_empty(numel)
        return self.memory[name][:numel].view(shape)


def cut(L, K, size):
    full = L - L % K
    edges = [*range(0, full, size * K), full]
    groups = [Group(a, b, K) for a, b in zip(edges, edges[1:])]
    if full < L:
        groups.append(Group(full, L, L - full))
    return groups


def blocks(x_BHL_, group):
    """View of a group's tokens as [N, B, H, K, ...]."""
    return x_BHL_[:, :, group.start : group.stop].unflatten(2, (-1, group.K)).movedim(2, 0)


def gather(group, q, k, v, lam, tau, gamma, beta, dtype, buf):
    B, H, _, F = q.shape
    K = group.K
    N = (group.stop - group.start) // K
    qx = buf("qx", N, B, H, 2 * K, F + 1)
    qx[..., F] = 1
    qx[..., :K, :F] = blocks(q, group)
    qx[..., K:, :F] = blocks(k, group)
    per_head = (x.to(dtype).repeat(B, 1).unsqueeze(1) for x in (gamma, beta))
    return Inputs(
        qx.flatten(1, 2),
        blocks(v, group).flatten(1, 2),
        blocks(lam, group).to(dtype).flatten(1, 2),
        tau[:K].to(dtype),
        *per_head,
    )


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lam, tau, gamma, beta, *state):
        model = INNER_MODEL[len(state)]
        carried = model.pack(*state)
        groups = cut(q.shape[2], len(tau), model.GROUP)
        checkpoints = [c.new_empty(len(groups), *c.shape) for c in carried]
        output = torch.empty_like(q)
        buf = Workspace(carried[0])
        for g, group in enumerate(groups):
            for checkpoint, c in zip(checkpoints, carried):
                checkpoint[g] = c
            inputs = gather(group, q, k, v, lam, tau, gamma, beta, carried[0].dtype, buf)
            output_NAKF, following = model.forward(inputs, carried, buf)
            blocks(output, group).copy_(output_NAKF.unflatten(1, q.shape[:2]))
            if group.K == len(tau):
                carried = following
        ctx.groups = groups
        ctx.model = model
        ctx.state_shapes = [W.shape for W in state]
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, *checkpoints)
        ctx.set_materialize_grads(False)
        return output, *model.unpack(*carried, *q.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_state):
        *inputs, = ctx.saved_tensors[:7]
        checkpoints = ctx.saved_tensors[7:]
        q, k, v, lam, tau, gamma, beta = inputs
        dtype = checkpoints[0].dtype
        B, H = q.shape[:2]
        buf = Workspace(checkpoints[0])
        dq, dk, dv, dlam = (torch.empty_like(x) for x in (q, k, v, lam))
        dtau, dgamma, dbeta = (torch.zeros_like(x, dtype=dtype) for x in (tau, gamma, beta))
        if d_output is None:
            d_output = torch.zeros_like(q)
        d_carried = ctx.model.pack(*(
            checkpoints[0].new_zeros(shape) if d is None else d.to(dtype)
            for d, shape in zip(d_state, ctx.state_shapes)
        ))
        for g in reversed(range(len(ctx.groups))):
            group = ctx.groups[g]
            full = group.K == len(tau)
            d_following = d_carried if full else [torch.zeros_like(d) for d in d_carried]
            gi = gather(group, q, k, v, lam, tau, gamma, beta, dtype, buf)
            grads, d_start = ctx.model.backward(
                gi, [c[g] for c in checkpoints], blocks(d_output, group).flatten(1, 2), d_following, buf
            )
            for d, x in zip((dq, dk, dv, dlam), grads):
                blocks(d, group).copy_(x.unflatten(1, (B, H)))
            dtau[:group.K] += grads[4]
            dgamma += grads[5].view(B, H, -1).sum(0)
            dbeta += grads[6].view(B, H, -1).sum(0)
            d_carried = d_start if full else [a + b for a, b in zip(d_carried, d_start)]
        grads = (dq, dk, dv, dlam, dtau.to(tau.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype))
        return *grads, *ctx.model.unpack(*d_carried, B, H)


def torch_scan(q, k, v, lam, tau, gamma, beta, state):
    """As `ttt_scan`, the state per batch and head."""
    output, *final_state = Scan.apply(q, k, v, lam, tau, gamma, beta, *state)
    return output, tuple(final_state)
