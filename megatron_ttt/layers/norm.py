"""RMSNorm, and the LayerNorm after the scan whose statistics span all TP ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.layers.parameters import new_parameter, ones, zeros


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that statistics are taken in: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) in at least float32, cast back, times a weight.

    Takes the place of any of megatron-core's norms; under sequence parallelism, where each rank
    sees its tokens only, the weight's gradient is summed over TP ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, (hidden_size,), ones)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        normalised = F.rms_norm(x.to(statistics_dtype(x)), x.shape[-1:], eps=self.eps)
        return normalised.to(x.dtype) * self.weight


class PostNorm(nn.Module):
    """LayerNorm over the whole hidden size, of which each TP rank holds its heads' columns."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, (hidden_size,), ones, shard_dim=0)
        self.bias = new_parameter(config, (hidden_size,), zeros, shard_dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size / TP] -> the same shape and dtype."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return _ShardedLayerNorm.apply(x, self.weight, self.bias, self.eps, group)


class _ShardedLayerNorm(torch.autograd.Function):
    """LayerNorm over columns that lie on several ranks (docs/mathematics.md, parallelism).

    forward: ranks exchange (mean_r, var_r) of each token: mu = mean of mean_r,
    var = mean of (var_r + (mean_r - mu)^2). backward: (sum g, sum g * xhat), g = weight * dy.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x.to(statistics_dtype(x))
        var_r, mean_r = torch.var_mean(wide, -1, correction=0)
        local = torch.stack([mean_r, var_r])
        gathered = torch.empty((group.size(), *local.shape), dtype=local.dtype, device=x.device)
        dist.all_gather(list(gathered.unbind(0)), local, group=group)
        means, variances = gathered[:, 0], gathered[:, 1]
        mu = means.mean(0)
        var = (variances + (means - mu).square()).mean(0)
        rstd = torch.rsqrt(var + eps).unsqueeze(-1)
        xhat = (wide - mu.unsqueeze(-1)) * rstd
        ctx.save_for_backward(x, weight, mu, rstd)
        ctx.group = group
        return (xhat * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mu, rstd = ctx.saved_tensors
        dtype = statistics_dtype(x)
        xhat = (x.to(dtype) - mu.unsqueeze(-1)) * rstd
        dy = dy.to(dtype)
        g = dy * weight
        sums = torch.stack([g.sum(-1), (g * xhat).sum(-1)])
        dist.all_reduce(sums, group=ctx.group)
        mean_g, mean_gx = (sums / (x.shape[-1] * ctx.group.size())).unsqueeze(-1)
        dx = (g - mean_g - xhat * mean_gx) * rstd
        tokens = tuple(range(dy.dim() - 1))
        dweight, dbias = (dy * xhat).sum(tokens), dy.sum(tokens)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None
