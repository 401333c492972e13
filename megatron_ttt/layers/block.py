"""megatron-core's transformer layer after a convolution of the residual stream, the pre-conv."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ttt.layers.conv import PreConv


class PreConvBlock(TransformerLayer):
    """h += preconv(h); h += mixer(RMSNorm(h)); h += SwiGLU(RMSNorm(h))."""

    def __init__(self, config, submodules, layer_number: int = 1, *, pre_conv_width: int, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.pre_conv = PreConv(config, config.hidden_size, pre_conv_width)

    def forward(self, hidden_states, *args, **kwargs):
        """[S, B, D] -> ([S, B, D], context), as TransformerLayer."""
        return super().forward(self.pre_conv(hidden_states), *args, **kwargs)
