"""Attention as a mixer: its checks, parameters, costs and module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ttt.errors import UserError, check_at_least
from megatron_ttt.layers.initialisers import normal
from megatron_ttt.mixers.attention.hf_config import HF_DEFAULTS, options_of_hf_model, to_hf_model
from megatron_ttt.mixers.attention.options import AttentionOptions
from megatron_ttt.mixers.base import (
    Dimensions,
    HFModel,
    Microbatch,
    Mixer,
    Parameter,
    check_even_head_dim,
)
from megatron_ttt.mixers.hf_code import HFCode

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class Attention(Mixer):
    """Causal attention with rotary embeddings: over all tokens before or a window of them, with
    heads of keys and values of their own or shared."""

    name = "attention"
    label = "Attention"
    hf_norms = ("input_layernorm", "post_attention_layernorm")
    hf_module = "self_attn"
    hf_defaults = HF_DEFAULTS
    hf_code = HFCode(Path(__file__).parent / "mixer_attention.py", "Attention")
    Options = AttentionOptions

    def validate(self, dims: Dimensions, options: AttentionOptions) -> None:
        """Raise UserError for options out of range."""
        at = f"mixers.{self.name}."
        if options.window is not None:
            check_at_least(f"{at}window", options.window, 1)
        check_at_least(f"{at}rope_theta", options.rope_theta, 1e-12)
        check_even_head_dim(dims)
        if options.num_kv_heads is not None:
            check_at_least(f"{at}num_kv_heads", options.num_kv_heads, 1)
            if dims.num_heads % options.num_kv_heads:
                raise UserError(
                    f"model.num_heads={dims.num_heads} is not divisible by "
                    f"{at}num_kv_heads={options.num_kv_heads}"
                )

    def check_tensor_parallel(self, dims: Dimensions, options: AttentionOptions, tp: int) -> None:
        """Raise UserError if the heads of keys and values do not divide over the ranks."""
        if _kv_heads(dims, options) % tp:
            raise UserError(
                f"mixers.{self.name}.num_kv_heads={options.num_kv_heads} is not divisible by "
                f"parallel.tensor_model_parallel_size={tp}"
            )

    def transformer_config_fields(
        self, dims: Dimensions, options: AttentionOptions
    ) -> dict[str, Any]:
        """Return the number of groups of query heads."""
        return {"num_query_groups": _kv_heads(dims, options)}

    def rotary_base(self, options: AttentionOptions) -> float:
        """Return rope_theta."""
        return options.rope_theta

    def flops_per_token(
        self, dims: Dimensions, options: AttentionOptions, seq_length: int
    ) -> float:
        """Return the FLOPs of a token's forward pass."""
        D, L, kv = dims.hidden_size, seq_length, _kv_heads(dims, options) * dims.head_dim
        window = min(options.window or L, L)
        seen = (window * (window + 1) / 2 + (L - window) * window) / L  # tokens, on average
        return 4 * D * D + 4 * D * kv + 4 * D * seen

    def saved_bytes(self, options: AttentionOptions, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor saved for the backward pass."""
        w, columns = batch.width, batch.columns
        kv = columns * _kv_heads(batch.dims, options) / batch.dims.num_heads
        saved = [w * (columns + 2 * kv), w * columns, w * kv]  # q, k, v; q and k, rotated
        if kv < columns:
            saved += [w * columns, w * columns]  # keys and values, repeated for the query heads
        if options.window is not None and options.window < batch.seq_length:
            saved += [w * columns]  # the outputs of the window's blocks
        saved += [w * batch.rows, w * columns]  # into the projection; attention's output
        return [*saved, w * columns] if batch.sequences > 1 else saved  # made contiguous

    def sent_bytes(self, options: AttentionOptions, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces: input and output, forward
        and backward, and under sequence parallelism the input once more for the weights."""
        return (5 if batch.sequence_parallel else 4) * batch.width * batch.whole

    def spec(self, options: AttentionOptions, backend: str = "auto") -> ModuleSpec:
        """Return megatron-core's own spec, but for the core."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.spec_utils import ModuleSpec

        from megatron_ttt.mixers.attention.core import CausalAttention

        spec = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.self_attention
        core = ModuleSpec(module=CausalAttention, params={"window": options.window})
        spec.submodules.core_attention = core
        return spec

    def parameters(self, dims: Dimensions, options: AttentionOptions) -> list[Parameter]:
        """Return the table; the rows of linear_qkv lie group by group: queries, key, value."""
        D, F, groups = dims.hidden_size, dims.head_dim, _kv_heads(dims, options)
        weights, queries = normal(dims.init_std), dims.num_heads // groups
        return [
            Parameter(
                "linear_qkv.weight",
                (groups * (queries + 2) * F, D),
                weights,
                tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
                shard_dim=0,
                groups=groups,
                ratios=(queries, 1, 1),
            ),
            Parameter("linear_proj.weight", (D, D), weights, ("self_attn.o_proj.weight",), 1),
        ]

    def hf_model(self, dims: Dimensions, options: AttentionOptions) -> HFModel | None:
        """Return Llama's form; None with a window."""
        return to_hf_model(dims, options)

    def options_of_hf_model(self, config: dict[str, Any]) -> AttentionOptions | None:
        """Return the options of a Llama's config.json."""
        return options_of_hf_model(config)

    def options_of_former_keys(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return what `rope_theta` of the model section stood for."""
        return {"rope_theta": model["rope_theta"]} if "rope_theta" in model else {}


def _kv_heads(dims: Dimensions, options: AttentionOptions) -> int:
    return options.num_kv_heads or dims.num_heads
