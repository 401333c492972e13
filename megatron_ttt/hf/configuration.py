"""The official config.json and our model section."""

from __future__ import annotations

from typing import Any

from megatron_ttt.config import ModelConfig
from megatron_ttt.errors import UserError

# The official defaults of what a config.json may leave out.
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_gate": False,
    "share_qk": False,
    "ttt_layer_type": "linear",
    "ttt_base_lr": 1.0,
    "mini_batch_size": 16,
    "pre_conv": False,
    "conv_kernel": 4,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def model_from_official(official: dict[str, Any]) -> ModelConfig:
    """The model section of an official config. Raises UserError for what has no counterpart."""
    config = {**_DEFAULTS, **official}
    layers = {"linear": "ttt_linear", "mlp": "ttt_mlp"}
    if config["ttt_layer_type"] not in layers:
        raise UserError(
            f"config.json: ttt_layer_type={config['ttt_layer_type']} is not linear or mlp"
        )
    flags = {config[name] for name in ("use_gate", "share_qk", "pre_conv")}
    if len(flags) > 1:
        raise UserError(
            "config.json: use_gate, share_qk and pre_conv must all be true (Mamba backbone) or all "
            "false (Transformer backbone)"
        )
    for name in ("hidden_act", "tie_word_embeddings"):
        if config[name] != _DEFAULTS[name]:
            raise UserError(f"config.json: only {name}={_DEFAULTS[name]} is supported")
    return ModelConfig(
        layer=layers[config["ttt_layer_type"]],
        backbone="mamba" if flags.pop() else "transformer",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        mini_batch_size=config["mini_batch_size"],
        ttt_base_lr=config["ttt_base_lr"],
        conv_kernel=config["conv_kernel"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        init_std=config["initializer_range"],
    )
