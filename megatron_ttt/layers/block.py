"""The TTT block: megatron-core's transformer layer after the Mamba backbone's pre-conv."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.conv import PreConv


class TTTBlock(TransformerLayer):
    """h += preconv(h); h += TTT(RMSNorm(h)); h += SwiGLU(RMSNorm(h))."""

    def __init__(self, config, submodules, layer_number: int = 1, *, model: ModelConfig, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.pre_conv = PreConv(config, model.hidden_size, model.conv_kernel)

    def forward(self, hidden_states, *args, **kwargs):
        """[S, B, D] -> ([S, B, D], context), as TransformerLayer."""
        return super().forward(self.pre_conv(hidden_states), *args, **kwargs)
