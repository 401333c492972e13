"""The official config.json of LaCT language models (github.com/a1600012888/LaCT, lact_llm)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import HFModel
from megatron_ttt.mixers.hf_code import HFCode, model_classes
from megatron_ttt.mixers.lact.options import LaCTOptions

HF_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attn_heads": 32,
    "num_lact_heads": 4,
    "inter_multi": 1,
    "qkv_bias": False,
    "attn_qk_norm": False,
    "lact_chunk_size": 2048,
    "use_muon": False,
    "lr_dim": 1,
    "qkv_silu": True,
    "no_v_silu": False,
    "window_size": 2048,
    "lr_parameterization": "mamba",
    "learnable_ttt_scale": True,
    "ttt_prenorm": False,
    "ttt_nope": False,
    "rope_theta": 1e6,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "initializer_range": 0.006,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "vocab_size": 32000,
    "use_momentum": True,
    "ttt_loss_type": "dot_product",
    "w0_w2_low_rank": 32,
    "fw_init_gain": 0.5,
    "tie_word_embeddings": False,
}
"""What is taken for keys that config.json leaves out; published files hold them all."""
_ONLY = {
    "lr_dim": 1,
    "lr_parameterization": "mamba",
    "elementwise_affine": True,
    "ttt_loss_type": "dot_product",
}
"""What our layer has no counterpart for unless it has this value."""
_KEYS = {
    "fast_heads": "num_lact_heads",
    "hidden_multiple": "inter_multi",
    "chunk_size": "lact_chunk_size",
    "window": "window_size",
    "momentum": "use_momentum",
    "muon": "use_muon",
    "low_rank_gain": "fw_init_gain",
    "pre_norm": "ttt_prenorm",
    "output_scale": "learnable_ttt_scale",
    "silu": "qkv_silu",
    "rope_theta": "rope_theta",
    "qkv_bias": "qkv_bias",
    "qk_norm": "attn_qk_norm",
}
"""Options, and the official keys that mean the same."""
_SIZES = {"num_attention_heads": "num_attn_heads", "rms_norm_eps": "norm_eps"}
"""Keys of other forms, and the official ones."""


def to_hf_model(options: LaCTOptions) -> HFModel:
    """Return the official form of a model of these layers."""
    keys = {
        **model_classes("configuration_lact.LaCTSWIGLUConfig"),
        "hidden_act": "swish",
        **{key: getattr(options, option) for option, key in _KEYS.items()},
        "no_v_silu": not options.value_silu,
        "ttt_nope": not options.fast_rope,
        "w0_w2_low_rank": options.low_rank or -1,
        **_ONLY,
    }
    configuration = HFCode(Path(__file__).parent / "configuration_lact.py", "LaCTSWIGLUConfig")
    return HFModel("lact_swiglu", keys, "embeddings", _SIZES, configuration)


def options_of_hf_model(config: dict[str, Any]) -> LaCTOptions | None:
    """Return the options of an official config.json, None if it is another model's."""
    if config.get("model_type") != "lact_swiglu":
        return None
    config = {**HF_DEFAULTS, **config}
    for name, value in _ONLY.items():
        if config[name] != value:
            raise UserError(f"config.json: only {name}={value} is supported, not {config[name]}")
    rank = config["w0_w2_low_rank"]
    return LaCTOptions(
        **{option: config[key] for option, key in _KEYS.items()},
        value_silu=not config["no_v_silu"],
        fast_rope=not config["ttt_nope"],
        low_rank=rank if rank > 0 else None,
    )


def sizes_of_hf_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with its sizes under the keys of other forms; the SwiGLU is
    `hidden_ratio` * 2/3 times as wide as the model where it says nothing of its width."""
    width = config["intermediate_size"]
    if width is None:
        width = int(config["hidden_size"] * config["hidden_ratio"] * 2 / 3)
        width = -(-width // 256) * 256
    sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    return {**config, **sizes, "intermediate_size": width}
