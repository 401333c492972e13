"""Causal depthwise convolution along the sequence, whole or cut over TP ranks.

Legend of the shape suffixes: S tokens (of this rank), B batch, C channels (of this rank), W width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ttt.layers.initialisers import lecun_normal, zeros
from megatron_ttt.layers.norm import RMSNorm, rms_norm
from megatron_ttt.layers.parameters import ParameterHolder, new_parameter, tensor_parallel_group
from megatron_ttt.ops.conv_rope import causal_conv
from megatron_ttt.ops.fused import can_use_fused_kernels


def conv_weights(config, channels: int, width: int) -> ParameterHolder:
    """Weight [C, 1, W] and bias [C] of a depthwise causal convolution that each rank has whole."""
    return ParameterHolder(
        weight=new_parameter(config, (channels, 1, width), lecun_normal(width)),
        bias=new_parameter(config, (channels,), zeros),
    )


class PreConv(nn.Module):
    """The Mamba backbone's first branch: h + conv(RMSNorm(h))."""

    def __init__(self, config, hidden_size: int, width: int, tp_group: ProcessGroup | None = None):
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tensor_parallel_group(tp_group)
        self.norm = ParameterHolder(weight=RMSNorm(config, hidden_size).weight)
        self.conv = conv_weights(config, hidden_size, width)
        self.width, self.sequence_parallel = width, config.sequence_parallel
        for parameter in self.conv.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, h_SBC: Tensor) -> Tensor:
        """h [S, B, C] (under sequence parallelism this rank's stretch of tokens) -> the same."""
        (scale_C,), (weight_C1W, bias_C) = self.norm(), self.conv()
        if can_use_fused_kernels(h_SBC) and not self.sequence_parallel:
            from megatron_ttt.ops.triton.rmsnorm_conv import rmsnorm_conv

            return rmsnorm_conv(h_SBC, scale_C, self.eps, weight_C1W, bias_C)
        x_SBC = rms_norm(h_SBC, scale_C, self.eps)
        halo = None
        if self.sequence_parallel:
            halo = _Halo.apply(x_SBC, self.width - 1, self.tp_group)
        return h_SBC + causal_conv(x_SBC, weight_C1W, bias_C, halo)


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
