"""Which mixer each layer of a model has, and the table of all the model's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ttt.config import Config, ModelConfig
from megatron_ttt.layers.initialisers import lecun_normal, normal, ones, zeros
from megatron_ttt.mixers import MIXERS
from megatron_ttt.mixers.base import Dimensions, HFModel, Mixer, Parameter

EMBEDDING = "embedding.word_embeddings.weight"
"""The name of the embedding, which is the head too where the two are tied."""
HEAD = "output_layer.weight"
"""The name of a head of its own."""


@dataclass(frozen=True)
class Layer:
    """A layer's mixer and the options it has there."""

    mixer: Mixer
    options: Any

    @property
    def pre_conv_width(self) -> int | None:
        """Width of the convolution before the mixer, None for none."""
        return self.mixer.pre_conv_width(self.options)


@dataclass(frozen=True)
class Architecture:
    """A model's sizes, pattern and mixers: what decides its parameters and what they compute."""

    model: ModelConfig
    mixers: Mapping[str, Any]
    """Options by the mixer's name, of those in the pattern."""

    @property
    def dims(self) -> Dimensions:
        """Sizes of a block."""
        model = self.model
        return Dimensions(model.hidden_size, model.num_heads, model.init_std)

    @property
    def kinds(self) -> dict[str, Layer]:
        """The different layers by their mixers' names, in the order they first come."""
        return {name: Layer(MIXERS[name], self.mixers[name]) for name in self.model.pattern}

    @property
    def layers(self) -> list[Layer]:
        """Every layer."""
        kinds = self.kinds
        return [kinds[name] for name in self.layer_kinds]

    @property
    def layer_kinds(self) -> list[str]:
        """The name of every layer's mixer: the pattern, repeated."""
        repeats = self.model.num_layers // len(self.model.pattern)
        return [*self.model.pattern] * repeats

    @property
    def is_hybrid(self) -> bool:
        """Whether its layers are of several kinds."""
        return len(self.kinds) > 1

    @property
    def label(self) -> str:
        """Its name for people, such as "TTT-Linear", or "TTT-Linear + Attention"."""
        return " + ".join(layer.mixer.label for layer in self.kinds.values())

    @property
    def hf_form(self) -> HFModel | None:
        """The form that the mixer of all layers has in Hugging Face, None for a pattern's form."""
        if self.is_hybrid:
            return None
        (layer,) = self.kinds.values()
        return layer.mixer.hf_model(self.dims, layer.options)

    @property
    def hf_embedding(self) -> str:
        """Hugging Face's name of the embedding."""
        return self.hf_form.embedding if self.hf_form else "embed_tokens"

    @property
    def pre_conv_reach(self) -> int:
        """Tokens that the widest pre-conv looks back; 0 where no layer has one."""
        return max((layer.pre_conv_width or 1) - 1 for layer in self.kinds.values())

    @property
    def has_inner_loop(self) -> bool:
        """Whether some layer trains an inner model."""
        return any(layer.mixer.has_inner_loop for layer in self.kinds.values())

    @property
    def warms_inner_lr(self) -> bool:
        """Whether the recipe of some layer's mixer warms the inner learning rate up."""
        return any(layer.mixer.warms_inner_lr for layer in self.kinds.values())

    def to_tree(self) -> dict[str, Any]:
        """Return the sections `model` and `mixers` of a configuration."""
        mixers = {name: dataclasses.asdict(options) for name, options in self.mixers.items()}
        return {"model": dataclasses.asdict(self.model), "mixers": mixers}

    def layer_parameters(self, kind: str) -> list[Parameter]:
        """Return the table of a layer of this kind; the mixer's names begin with
        `self_attention.`, the SwiGLU's with `mlp.`."""
        model, layer = self.model, self.kinds[kind]
        D, width, weights = model.hidden_size, model.ffn_hidden_size, normal(model.init_std)
        before, after = (f"{name}.weight" for name in layer.mixer.hf_norms)
        table = []
        if kernel := layer.pre_conv_width:
            norm, conv = "pre_conv.norm.weight", "pre_conv.conv."
            shape = (D, 1, kernel)
            table += [
                Parameter(norm, (D,), ones, ("conv.norm.weight",)),
                Parameter(f"{conv}weight", shape, lecun_normal(kernel), ("conv.conv.weight",)),
                Parameter(f"{conv}bias", (D,), zeros, ("conv.conv.bias",)),
            ]
        gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        return [
            *table,
            Parameter("input_layernorm.weight", (D,), ones, (before,)),
            *(
                dataclasses.replace(row, name=f"self_attention.{row.name}")
                for row in layer.mixer.parameters(self.dims, layer.options)
            ),
            Parameter("pre_mlp_layernorm.weight", (D,), ones, (after,)),
            Parameter("mlp.linear_fc1.weight", (2 * width, D), weights, gate_up, 0),
            Parameter("mlp.linear_fc2.weight", (D, width), weights, ("mlp.down_proj.weight",), 1),
        ]

    def parameters(self) -> dict[str, Parameter]:
        """Return the table of all parameters, by their names in the whole model.

        The rows' own names, and Hugging Face's, are those within the whole model, too. Shapes are
        without the rows that pad the vocabulary.
        """
        model = self.model
        ends, weights = (model.vocab_size, model.hidden_size), normal(model.init_std)
        tables = {kind: self.layer_parameters(kind) for kind in self.kinds}
        table = [
            Parameter(EMBEDDING, ends, weights, (f"model.{self.hf_embedding}.weight",), 0),
            *(
                _numbered(row, number)
                for number, kind in enumerate(self.layer_kinds)
                for row in tables[kind]
            ),
            Parameter(
                "decoder.final_layernorm.weight", (model.hidden_size,), ones, ("model.norm.weight",)
            ),
        ]
        if not model.tie_word_embeddings:
            table.append(Parameter(HEAD, ends, weights, ("lm_head.weight",), 0))
        return {row.name: row for row in table}


def architecture_of(config: Config) -> Architecture:
    """Return the architecture that a configuration describes."""
    return Architecture(config.model, config.mixers)


def _numbered(row: Parameter, number: int) -> Parameter:
    return dataclasses.replace(
        row,
        name=f"decoder.layers.{number}.{row.name}",
        hf_names=tuple(f"model.layers.{number}.{name}" for name in row.hf_names),
    )
