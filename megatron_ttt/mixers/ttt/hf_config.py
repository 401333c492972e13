"""The official config.json of models of TTT layers (test-time-training/ttt-lm-pytorch)."""

from __future__ import annotations

from typing import Any

from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import HFModel
from megatron_ttt.mixers.hf_code import model_classes
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.options import TTTOptions

HF_DEFAULTS = {
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
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""The official defaults of what a config.json may leave out."""


def to_hf_model(inner_model: InnerModel, options: TTTOptions) -> HFModel:
    """Return the official form of a model of these layers."""
    keys = {
        **model_classes(),
        "ttt_layer_type": inner_model.name,
        "ttt_base_lr": options.base_lr,
        "mini_batch_size": options.mini_batch_size,
        "use_gate": options.use_gate,
        "share_qk": options.share_qk,
        "pre_conv": options.pre_conv,
        "conv_kernel": options.conv_kernel,
        "rope_theta": options.rope_theta,
        "scan_checkpoint_group_size": 0,
    }
    return HFModel("ttt", keys)


def options_of_hf_model(inner_model: InnerModel, config: dict[str, Any]) -> TTTOptions | None:
    """Return the options of an official config.json, None if it is another model's."""
    if config.get("model_type", "ttt") != "ttt":
        return None
    config = {**HF_DEFAULTS, **config}
    if config["ttt_layer_type"] not in ("linear", "mlp"):
        raise UserError(
            f"config.json: ttt_layer_type={config['ttt_layer_type']} is not linear or mlp"
        )
    if config["ttt_layer_type"] != inner_model.name:
        return None
    return TTTOptions(
        use_gate=config["use_gate"],
        share_qk=config["share_qk"],
        pre_conv=config["pre_conv"],
        mini_batch_size=config["mini_batch_size"],
        base_lr=config["ttt_base_lr"],
        conv_kernel=config["conv_kernel"],
        rope_theta=config["rope_theta"],
    )
