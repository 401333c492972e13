"""Causal depthwise convolution along the sequence, whole or cut over TP ranks.

Legend of the shape suffixes: S tokens (of this rank), B batch, C channels (of this rank), W width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.layers.parameters import lecun_normal, new_parameter, zeros
from megatron_ttt.ops.conv_rotate import causal_conv
from megatron_ttt.ops.fused import runs_fused


class CausalConv(nn.Module):
    """Depthwise causal convolution with bias and no activation, width `config.conv_kernel`.

    sharded: the channels are this rank's heads' (conv_q, conv_k); else all of them (pre-conv).
    """

    def __init__(self, config, channels: int, width: int, *, sharded: bool):
        super().__init__()
        dim = 0 if sharded else None
        self.weight = new_parameter(
            config, (channels, 1, width), lecun_normal(width), shard_dim=dim
        )
        self.bias = new_parameter(config, (channels,), zeros, shard_dim=dim)

    def forward(self, x_SBC: Tensor, halo_WBC: Tensor | None = None) -> Tensor:
        """Convolve tokens, preceded by the W-1 tokens `halo_WBC` (zeros at a sequence's start)."""
        return causal_conv(x_SBC, self.weight, self.bias, halo_WBC)


class PreConv(nn.Module):
    """The Mamba backbone's first branch: conv(RMSNorm(h)), added to the residual by the block."""

    def __init__(self, config, hidden_size: int, width: int):
        super().__init__()
        self.norm = RMSNorm(config, hidden_size, config.layernorm_epsilon)
        self.conv = CausalConv(config, hidden_size, width, sharded=False)
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.conv.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, h_SBC: Tensor) -> Tensor:
        """h [S, B, C] (under sequence parallelism this rank's stretch of tokens) -> the same."""
        x = self.norm(h_SBC)
        halo = None
        if self.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            halo = _Halo.apply(x, self.conv.weight.shape[-1] - 1, group)
        return self.conv(x, halo)

    def added_to(self, h_SBC: Tensor) -> Tensor:
        """h plus the branch, in one go where its kernels run."""
        if runs_fused(h_SBC) and not self.sequence_parallel:
            from megatron_ttt.ops.triton.norm_conv import norm_conv

            norm, conv = self.norm, self.conv
            return norm_conv(h_SBC, norm.weight, norm.eps, conv.weight, conv.bias)
        return h_SBC + self(h_SBC)


class _Halo(torch.autograd.Function):
    """The last `width` tokens of the previous rank's stretch; zeros on the first rank."""

    @staticmethod
    def forward(ctx, x, width, group):
        ctx.width, ctx.group, ctx.length = width, group, x.shape[0]
        tails = _all_gather(x[-width:].contiguous(), group)
        rank = group.rank()
        return tails[rank - 1] if rank else torch.zeros_like(tails[0])

    @staticmethod
    def backward(ctx, dhalo):
        # The next rank read our tail, so its gradient is ours to add.
        dhalos = _all_gather(dhalo.contiguous(), ctx.group)
        dx = dhalo.new_zeros((ctx.length, *dhalo.shape[1:]))
        if ctx.group.rank() + 1 < ctx.group.size():
            dx[-ctx.width :] = dhalos[ctx.group.rank() + 1]
        return dx, None, None


def _all_gather(tensor: Tensor, group) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    return gathered
