from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.linear import LinearGroup

INNER_MODEL = {2: LinearGroup}


class Span(NamedTuple):
    """Consecutive mini-batches: tokens start to stop, K to a mini-batch."""

    start: int
    stop: int
    K: int

    @property
    def shape(self):
        return (self.stop - self.start) // self.K, self.K


def cut(L, K, size):
    full = L - L % K
    edges = [*range(0, full, size * K), full]
    spans = [Span(a, b, K) for a, b in zip(edges, edges[1:])]
    if full < L:
        spans.append(Span(full, L, L - full))
    return spans


def blocks(x_BHL_, span):
    """View of a span's tokens as [N, B, H, K, ...]."""
    return x_BHL_[:, :, span.start : span.stop].unflatten(2, span.shape).movedim(2, 0)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lam, tau, gamma, beta, *state):
        Group = INNER_MODEL[len(state)]
        carried = Group.pack(*state)
        dtype = carried[0].dtype
        B, H, L, F = q.shape
        spans = cut(L, len(tau), Group.SIZE)
        checkpoints = [c.new_empty(len(spans), *c.shape) for c in carried]
        output = torch.empty_like(q)
        group = None
        tau_ = tau.to(dtype)
        gamma_, beta_ = (x.to(dtype).repeat(B, 1).unsqueeze(1) for x in (gamma, beta))
        for g, span in enumerate(spans):
            for checkpoint, c in zip(checkpoints, carried):
                checkpoint[g] = c
            N, K = span.shape
            if group is None or group.shape != (N, B * H, K, F):
                group = Group(N, B * H, K, F, *carried)
            group.load(*(blocks(x, span) for x in (q, k, v, lam)), tau_[:K], gamma_, beta_)
            output_NAKF, following = group.forward(*carried)
            blocks(output, span).copy_(output_NAKF.unflatten(1, q.shape[:2]))
            if K == len(tau):
                for c, f in zip(carried, following):
                    c.copy_(f)
        ctx.Group = Group
        ctx.spans = spans
        ctx.state_shapes = [W.shape for W in state]
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, *checkpoints)
        ctx.set_materialize_grads(False)
        return output, *Group.unpack(*carried, *q.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_state):
        *inputs, = ctx.saved_tensors[:7]
        checkpoints = ctx.saved_tensors[7:]
        q, k, v, lam, tau, gamma, beta = inputs
        dtype = checkpoints[0].dtype
        B, H, L, F = q.shape
        dq, dk, dv, dlam = (torch.empty_like(x) for x in (q, k, v, lam))
        dtau, dgamma, dbeta = (torch.zeros_like(x, dtype=dtype) for x in (tau, gamma, beta))
        if d_output is None:
            d_output = torch.zeros_like(q)
        d_carried = ctx.Group.pack(*(
            checkpoints[0].new_zeros(shape) if d is None else d.to(dtype)
            for d, shape in zip(d_state, ctx.state_shapes)
        ))
        tau_ = tau.to(dtype)
        gamma_, beta_ = (x.to(dtype).repeat(B, 1).unsqueeze(1) for x in (gamma, beta))
        group = None
        for g in reversed(range(len(ctx.spans))):
            span = ctx.spans[g]
            N, K = span.shape
            if group is None or group.shape != (N, B * H, K, F):
                group = ctx.Group(N, B * H, K, F, *(c[0] for c in checkpoints))
                group.prepare_backward()
            full = K == len(tau)
            d_following = d_carried if full else [torch.zeros_like(d) for d in d_carried]
            group.load(*(blocks(x, span) for x in (q, k, v, lam)), tau_[:K], gamma_, beta_)
            grads, d_start = group.backward(*(c[g] for c in checkpoints), blocks(d_output, span), *d_following)
            for d, x in zip((dq, dk, dv, dlam), grads):
                blocks(d, span).copy_(x.unflatten(1, (B, H)))
            dtau[:K] += grads[4]
            dgamma += grads[5].view(B, H, -1).sum(0)
            dbeta += grads[6].view(B, H, -1).sum(0)
            d_carried = [d.clone() for d in d_start] if full else [a + b for a, b in zip(d_carried, d_start)]
        grads = (dq, dk, dv, dlam, dtau.to(tau.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype))
        return *grads, *ctx.Group.unpack(*d_carried, B, H)


def torch_scan(q, k, v, lam, tau, gamma, beta, state):
    """As `ttt_scan`, the state per batch and head."""
    output, *final_state = Scan.apply(q, k, v, lam, tau, gamma, beta, *state)
    return output, tuple(final_state)
