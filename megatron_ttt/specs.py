"""Which class stands where in a block: megatron-core's layer specs."""

from __future__ import annotations

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ttt.layers.block import block_spec
from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.stack import Layer


def block_submodules(layers: list[Layer], scan_backend: str) -> TransformerBlockSubmodules:
    """Return the blocks of one pipeline chunk and the norm after the last."""
    specs = [
        block_spec(layer.mixer.spec(layer.options, scan_backend), layer.pre_conv_width)
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
