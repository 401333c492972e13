"""Which class stands where in a block: megatron-core's layer specs."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.block import block_spec
from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.stack import mixer_of


def layer_spec(model: ModelConfig, scan_backend: str) -> ModuleSpec:
    """Return the spec of one block."""
    mixer, options = mixer_of(model)
    return block_spec(mixer.spec(options, scan_backend), mixer.pre_conv_width(options))


def block_submodules(model: ModelConfig, num_layers: int, scan_backend: str):
    """Return the `num_layers` blocks of one pipeline chunk and the norm after the last."""
    specs = [layer_spec(model, scan_backend) for _ in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
