"""The official config.json and our model section, in both directions.

A TTT model's model_type is "ttt"; the Transformer baseline is a "llama".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ttt.config import Config, ModelConfig, config_from_tree
from megatron_ttt.errors import UserError

# The official defaults of what a config.json may leave out.
_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
_TTT = {
    **_COMMON,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "use_gate": False,
    "share_qk": False,
    "ttt_layer_type": "linear",
    "ttt_base_lr": 1.0,
    "mini_batch_size": 16,
    "pre_conv": False,
    "conv_kernel": 4,
    "tie_word_embeddings": True,
}
_LLAMA = {
    **_COMMON,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
# What the baseline has no counterpart for unless it has this value.
_LLAMA_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
_LAYERS = {"linear": "ttt_linear", "mlp": "ttt_mlp"}


def read_hf_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises UserError where there is none."""
    try:
        official = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(official, dict):
        raise UserError(f"{path} holds a {type(official).__name__}, not keys and values")
    return official


def model_from_hf_config(official: dict[str, Any]) -> ModelConfig:
    """The model section of an official config. Raises UserError for what has no counterpart."""
    kind = official.get("model_type", "ttt")
    if kind not in ("ttt", "llama"):
        raise UserError(f"config.json: model_type={kind} is not ttt or llama")
    # transformers 5 writes a Llama's rope_theta into rope_parameters.
    rope = official.get("rope_parameters") or {}
    config = {**(_TTT if kind == "ttt" else _LLAMA), **rope, **official}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json: only rope_type=default is supported, not {rope}")
    fields = _ttt_fields(config) if kind == "ttt" else _llama_fields(config)
    numbers = {
        "num_layers": ("num_hidden_layers", int),
        "hidden_size": ("hidden_size", int),
        "num_heads": ("num_attention_heads", int),
        "ffn_hidden_size": ("intermediate_size", int),
        "vocab_size": ("vocab_size", int),
        "rope_theta": ("rope_theta", float),
        "norm_eps": ("rms_norm_eps", float),
        "init_std": ("initializer_range", float),
    }
    for field, (key, kind) in numbers.items():
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise UserError(f"config.json: {key}={value!r} is no positive {kind.__name__}")
        fields[field] = kind(value)
    model = ModelConfig(**fields)
    if model.hidden_size % (2 * model.num_heads):
        raise UserError(
            f"config.json: hidden_size={model.hidden_size} over num_attention_heads="
            f"{model.num_heads} is no even head size"
        )
    return model


def _ttt_fields(config: dict[str, Any]) -> dict[str, Any]:
    if config["ttt_layer_type"] not in _LAYERS:
        raise UserError(
            f"config.json: ttt_layer_type={config['ttt_layer_type']} is not linear or mlp"
        )
    flags = {name: config[name] for name in ("use_gate", "share_qk", "pre_conv")}
    if list(flags.values()) not in ([True] * 3, [False] * 3):
        found = ", ".join(f"{name}={json.dumps(value)}" for name, value in flags.items())
        raise UserError(
            f"config.json: {found} is not supported: either all three are true (the Mamba "
            "backbone) or all three are false (the Transformer backbone)"
        )
    for name in ("hidden_act", "tie_word_embeddings"):
        if config[name] != _TTT[name]:
            raise UserError(f"config.json: only {name}={_TTT[name]} is supported")
    return {
        "layer": _LAYERS[config["ttt_layer_type"]],
        "backbone": "mamba" if flags["use_gate"] else "transformer",
        "mini_batch_size": config["mini_batch_size"],
        "ttt_base_lr": config["ttt_base_lr"],
        "conv_kernel": config["conv_kernel"],
    }


def _llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    for name, value in _LLAMA_ONLY.items():
        if config[name] != value:
            raise UserError(f"config.json: only {name}={value} is supported, not {config[name]}")
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise UserError("config.json: only num_key_value_heads=num_attention_heads is supported")
    if config.get("head_dim") not in (None, config["hidden_size"] // heads):
        raise UserError("config.json: only head_dim=hidden_size/num_attention_heads is supported")
    return {"layer": "attention"}


def hf_config_from_model(model: ModelConfig) -> dict[str, Any]:
    """The official config of a model section: architecture, nothing about tokens or dtype."""
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if not model.is_ttt:
        return {
            **config,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_key_value_heads": model.num_heads,
            "attention_bias": False,
            "mlp_bias": False,
        }
    return {
        **config,
        "model_type": "ttt",
        "architectures": ["TTTForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ttt.TTTConfig",
            "AutoModel": "modeling_ttt.TTTModel",
            "AutoModelForCausalLM": "modeling_ttt.TTTForCausalLM",
        },
        "ttt_layer_type": next(k for k, v in _LAYERS.items() if v == model.layer),
        "ttt_base_lr": model.ttt_base_lr,
        "mini_batch_size": model.mini_batch_size,
        "use_gate": model.is_mamba,
        "share_qk": model.is_mamba,
        "pre_conv": model.is_mamba,
        "conv_kernel": model.conv_kernel,
        "scan_checkpoint_group_size": 0,
    }


def config_with_defaults(tree: dict[str, Any], path: Path, overrides: list[str] = ()) -> Config:
    """A whole configuration for a model at `path`; defaults for what one not trained here lacks."""
    defaults = {
        "optimizer": {"lr": 0.0},
        "training": {"steps": 1, "precision": "fp32"},
        "run": {"dir": str(path.parent)},
    }
    for section, values in defaults.items():
        own = tree.get(section, {})
        if isinstance(own, dict):
            tree = {**tree, section: {**values, **own}}
    return config_from_tree(tree, str(path), overrides)
