"""Which class stands where in a block: megatron-core's layer specs."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.block import PreConvBlock
from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.stack import mixer_of


def layer_spec(model: ModelConfig, scan_backend: str) -> ModuleSpec:
    """Return the spec of one block: megatron-core's, with our norms, mixer and pre-conv."""
    mixer, options = mixer_of(model)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention = mixer.spec(options, scan_backend)
    if width := mixer.pre_conv_width(options):
        spec.module, spec.params = PreConvBlock, {"pre_conv_width": width}
    return spec


def block_submodules(model: ModelConfig, num_layers: int, scan_backend: str):
    """Return the `num_layers` blocks of one pipeline chunk and the norm after the last."""
    specs = [layer_spec(model, scan_backend) for _ in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
