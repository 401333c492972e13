"""LayerNorm over all heads, whose columns several TP ranks may share."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def sharded_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, group) -> Tensor:
    """LayerNorm over the columns of all ranks of `group`, of which each has as many. Collective.

    x [..., D], weight and bias [D] are this rank's. Returns x's shape and dtype; statistics are in
    at least float32.
    """
    if group.size() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return ShardedLayerNorm.apply(x, weight, bias, eps, group)


def row_statistics(var_r: Tensor, mean_r: Tensor, eps: float, group) -> tuple[Tensor, Tensor]:
    """Mean and 1/s of rows of which each rank has its columns' mean and variance: mu = mean of
    mean_r, var = mean of (var_r + (mean_r - mu)^2); docs/mathematics.md, parallelism."""
    local = torch.stack([mean_r, var_r])
    gathered = torch.empty((group.size(), *local.shape), dtype=local.dtype, device=local.device)
    dist.all_gather(list(gathered.unbind(0)), local, group=group)
    means, variances = gathered[:, 0], gathered[:, 1]
    mu = means.mean(0)
    var = (variances + (means - mu).square()).mean(0)
    return mu, torch.rsqrt(var + eps)


class ShardedLayerNorm(torch.autograd.Function):
    """LayerNorm over columns that lie on several ranks.

    Of each row they exchange, forward, what `row_statistics` says, backward (sum g, sum g * xhat),
    g = weight * dy.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mu, rstd = row_statistics(*torch.var_mean(wide, -1, correction=0), eps, group)
        xhat = (wide - mu.unsqueeze(-1)) * rstd.unsqueeze(-1)
        ctx.save_for_backward(x, weight, mu, rstd)
        ctx.group = group
        return (xhat * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mu, rstd = ctx.saved_tensors
        mu, rstd = mu.unsqueeze(-1), rstd.unsqueeze(-1)
        xhat = (x.to(mu.dtype) - mu) * rstd
        dy = dy.to(mu.dtype)
        g = dy * weight
        sums = torch.stack([g.sum(-1), (g * xhat).sum(-1)])
        dist.all_reduce(sums, group=ctx.group)
        mean_g, mean_gx = (sums / (x.shape[-1] * ctx.group.size())).unsqueeze(-1)
        dx = (g - mean_g - xhat * mean_gx) * rstd
        tokens = tuple(range(dy.dim() - 1))
        dweight, dbias = (dy * xhat).sum(tokens), dy.sum(tokens)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None
