"""Which mixer the layers of a model have, and the table of all the model's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.initialisers import lecun_normal, normal, ones, zeros
from megatron_ttt.mixers import MIXERS
from megatron_ttt.mixers.base import Dimensions, Mixer, Parameter

EMBEDDING = "embedding.word_embeddings.weight"
"""The name of the embedding, which is the head too."""


def mixer_of(model: ModelConfig) -> tuple[Mixer, Any]:
    """Return the mixer of a model's layers and its options."""
    mixer = MIXERS[model.layer]
    is_mamba = model.backbone == "mamba"
    given = {
        "use_gate": is_mamba,
        "share_qk": is_mamba,
        "pre_conv": is_mamba,
        "mini_batch_size": model.mini_batch_size,
        "base_lr": model.ttt_base_lr,
        "conv_kernel": model.conv_kernel,
        "rope_theta": model.rope_theta,
    }
    known = {field.name for field in dataclasses.fields(mixer.Options)}
    return mixer, mixer.Options(**{key: value for key, value in given.items() if key in known})


def dimensions(model: ModelConfig) -> Dimensions:
    """Return the sizes of a model's blocks."""
    return Dimensions(model.hidden_size, model.num_heads, model.init_std)


def model_parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Return the table of all parameters of a model, by their names in the whole model.

    The rows' own names, and Hugging Face's, are those within the whole model, too. Shapes are
    without the rows that pad the vocabulary.
    """
    D, weights = model.hidden_size, normal(model.init_std)
    layer = layer_parameters(model)
    table = [
        Parameter(EMBEDDING, (model.vocab_size, D), weights, ("model.embed_tokens.weight",), 0),
        *(_numbered(row, number) for number in range(model.num_layers) for row in layer),
        Parameter("decoder.final_layernorm.weight", (D,), ones, ("model.norm.weight",)),
    ]
    return {row.name: row for row in table}


def _numbered(row: Parameter, number: int) -> Parameter:
    return dataclasses.replace(
        row,
        name=f"decoder.layers.{number}.{row.name}",
        hf_names=tuple(f"model.layers.{number}.{name}" for name in row.hf_names),
    )


def layer_parameters(model: ModelConfig) -> list[Parameter]:
    """Return the table of one layer's parameters; the mixer's names begin with `self_attention.`,
    the SwiGLU's with `mlp.`."""
    mixer, options = mixer_of(model)
    D, width, weights = model.hidden_size, model.ffn_hidden_size, normal(model.init_std)
    before, after = (f"{name}.weight" for name in mixer.hf_norms)
    table = []
    if kernel := mixer.pre_conv_width(options):
        table += [
            Parameter("pre_conv.norm.weight", (D,), ones, ("conv.norm.weight",)),
            Parameter(
                "pre_conv.conv.weight", (D, 1, kernel), lecun_normal(kernel), ("conv.conv.weight",)
            ),
            Parameter("pre_conv.conv.bias", (D,), zeros, ("conv.conv.bias",)),
        ]
    table += [Parameter("input_layernorm.weight", (D,), ones, (before,))]
    table += [
        dataclasses.replace(row, name=f"self_attention.{row.name}")
        for row in mixer.parameters(dimensions(model), options)
    ]
    gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    return [
        *table,
        Parameter("pre_mlp_layernorm.weight", (D,), ones, (after,)),
        Parameter("mlp.linear_fc1.weight", (2 * width, D), weights, gate_up, 0),
        Parameter("mlp.linear_fc2.weight", (D, width), weights, ("mlp.down_proj.weight",), 1),
    ]
