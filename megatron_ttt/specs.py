"""Which class stands where in a block: megatron-core's layer specs."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ttt.layers.block import PreConvBlock
from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.stack import Layer


def layer_spec(layer: Layer, scan_backend: str) -> ModuleSpec:
    """Return the spec of one block: megatron-core's, with our norms, mixer and pre-conv."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention = layer.mixer.spec(layer.options, scan_backend)
    if width := layer.pre_conv_width:
        spec.module, spec.params = PreConvBlock, {"pre_conv_width": width}
    return spec


def block_submodules(layers: list[Layer], scan_backend: str) -> TransformerBlockSubmodules:
    """Return the blocks of one pipeline chunk and the norm after the last."""
    specs = [layer_spec(layer, scan_backend) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
