"""RMSNorm, and the LayerNorm after the scan whose statistics span all TP ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ttt.layers.initialisers import ones, zeros
from megatron_ttt.layers.parameters import new_parameter, tensor_parallel_group
from megatron_ttt.ops.fused import can_use_fused_kernels
from megatron_ttt.ops.sharded_layer_norm import sharded_layer_norm


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that statistics are taken in: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension in at least float32, cast back, times `weight`."""
    normalised = F.rms_norm(x.to(statistics_dtype(x)), x.shape[-1:], eps=eps)
    return normalised.to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` as a module.

    Takes the place of any of megatron-core's norms; under sequence parallelism, where each rank
    sees its tokens only, the weight's gradient is summed over TP ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, (hidden_size,), ones)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class PostNorm(nn.Module):
    """LayerNorm over the whole hidden size, of which each TP rank holds its heads' columns."""

    def __init__(
        self, config, hidden_size: int, eps: float = 1e-6, tp_group: ProcessGroup | None = None
    ):
        super().__init__()
        self.eps, self.tp_group = eps, tensor_parallel_group(tp_group)
        cut = {"shard_dim": 0, "tp_group": self.tp_group}
        self.weight = new_parameter(config, (hidden_size,), ones, **cut)
        self.bias = new_parameter(config, (hidden_size,), zeros, **cut)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., hidden_size / TP] -> the same shape and dtype; times gelu(gate) if there is one,
        in one kernel where it runs."""
        if gate is not None and can_use_fused_kernels(x):
            from megatron_ttt.ops.triton.layernorm_gate import layernorm_gate

            return layernorm_gate(x, gate, self.weight, self.bias, self.eps, self.tp_group)
        out = sharded_layer_norm(x, self.weight, self.bias, self.eps, self.tp_group)
        return out if gate is None else F.gelu(gate, approximate="tanh") * out
