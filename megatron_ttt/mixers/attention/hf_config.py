"""The config.json of models of full attention: Llama's."""

from __future__ import annotations

from typing import Any

from megatron_ttt.errors import UserError
from megatron_ttt.mixers.attention.options import AttentionOptions
from megatron_ttt.mixers.base import Dimensions, HFModel

HF_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""transformers' defaults of what a config.json may leave out."""
_ONLY = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
"""What our attention has no counterpart for unless it has this value."""


def to_hf_model(dims: Dimensions, options: AttentionOptions) -> HFModel | None:
    """Return Llama's form; None with a window, which Llama has not."""
    if options.window is not None:
        return None
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": options.num_kv_heads or dims.num_heads,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": options.rope_theta,
    }
    return HFModel("llama", keys)


def options_of_hf_model(config: dict[str, Any]) -> AttentionOptions | None:
    """Return the options of Llama's config.json, None if it is another model's."""
    if config.get("model_type") != "llama":
        return None
    config = {**HF_DEFAULTS, **config}
    for name, value in _ONLY.items():
        if config[name] != value:
            raise UserError(f"config.json: only {name}={value} is supported, not {config[name]}")
    heads = config["num_attention_heads"]
    if config.get("head_dim") not in (None, config["hidden_size"] // heads):
        raise UserError("config.json: only head_dim=hidden_size/num_attention_heads is supported")
    kv_heads = config["num_key_value_heads"]
    return AttentionOptions(
        num_kv_heads=None if kv_heads == heads else kv_heads, rope_theta=config["rope_theta"]
    )
