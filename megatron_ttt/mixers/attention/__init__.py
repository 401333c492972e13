"""Softmax attention: what the Transformer baseline has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ttt.layers.initialisers import normal
from megatron_ttt.mixers.base import Dimensions, Microbatch, Mixer, Parameter

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class AttentionOptions:
    """Options of attention."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding."""


class Attention(Mixer):
    """Multi-head attention over all tokens before, with rotary embeddings."""

    name = "attention"
    label = "Transformer"
    hf_norms = ("input_layernorm", "post_attention_layernorm")
    Options = AttentionOptions

    def flops_per_token(
        self, dims: Dimensions, options: AttentionOptions, seq_length: int
    ) -> float:
        """Return the FLOPs of a token's forward pass; it sees half of the sequence on average."""
        D = dims.hidden_size
        return 8 * D * D + 2 * D * (seq_length + 1)

    def saved_bytes(self, options: AttentionOptions, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor saved for the backward pass."""
        w, columns = batch.width, batch.columns
        saved = [w * 3 * columns, w * columns, w * columns]  # q, k, v; q and k, rotated
        saved += [w * batch.rows, w * columns]  # into the projection; attention's output
        return [*saved, w * columns] if batch.sequences > 1 else saved  # made contiguous

    def sent_bytes(self, options: AttentionOptions, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces: input and output, forward
        and backward, and under sequence parallelism the input once more for the weights."""
        return (5 if batch.sequence_parallel else 4) * batch.width * batch.whole

    def spec(self, options: AttentionOptions, backend: str = "auto") -> ModuleSpec:
        """Return megatron-core's own spec, but for the core."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from megatron_ttt.mixers.attention.core import CausalAttention

        spec = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.self_attention
        spec.submodules.core_attention = CausalAttention
        return spec

    def parameters(self, dims: Dimensions, options: Any) -> list[Parameter]:
        """Return the table; the rows of linear_qkv lie head by head: queries, keys, values."""
        D, weights = dims.hidden_size, normal(dims.init_std)
        projections = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
        output = ("self_attn.o_proj.weight",)
        return [
            Parameter(
                "linear_qkv.weight", (3 * D, D), weights, projections, 0, groups=dims.num_heads
            ),
            Parameter("linear_proj.weight", (D, D), weights, output, 1),
        ]


ATTENTION = Attention()
