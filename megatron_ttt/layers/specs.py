"""Which class stands where in a block: megatron-core's layer specs for the three mixers."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.attention import CausalAttention
from megatron_ttt.layers.block import TTTBlock
from megatron_ttt.layers.norm import RMSNorm
from megatron_ttt.layers.ttt_mixer import TTTMixer, TTTMixerSubmodules


def layer_spec(model: ModelConfig, scan_backend: str) -> ModuleSpec:
    """The spec of one block: megatron-core's local one with our norms, mixer and pre-conv."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if not model.is_ttt:
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
        return spec
    spec.submodules.self_attention = ModuleSpec(
        module=TTTMixer,
        params={"model": model, "scan_backend": scan_backend},
        submodules=TTTMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    if model.is_mamba:
        spec.module, spec.params = TTTBlock, {"model": model}
    return spec


def block_submodules(model: ModelConfig, num_layers: int, scan_backend: str):
    """The `num_layers` blocks of one pipeline chunk and the norm after the last."""
    specs = [layer_spec(model, scan_backend) for _ in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
