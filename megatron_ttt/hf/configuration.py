"""The config.json of a model and our architecture, in both directions.

A model all of whose layers are of one mixer has that mixer's own form, such as Llama's, where there
is one; every other model has ours, with `layer_types` and `mixers` (docs/huggingface.md).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

from megatron_ttt.config import ModelConfig
from megatron_ttt.errors import UserError
from megatron_ttt.mixers import MIXERS, check_known, load_mixers
from megatron_ttt.mixers.hf_code import model_classes
from megatron_ttt.stack import Architecture

_SIZES = {
    "num_layers": ("num_hidden_layers", int),
    "hidden_size": ("hidden_size", int),
    "num_heads": ("num_attention_heads", int),
    "ffn_hidden_size": ("intermediate_size", int),
    "vocab_size": ("vocab_size", int),
    "norm_eps": ("rms_norm_eps", float),
    "init_std": ("initializer_range", float),
}
"""Fields of the model section, with their keys in config.json and their types."""
_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
"""What every form has where config.json leaves it out."""


def read_hf_config(path: Path) -> dict[str, Any]:
    """Return a config.json. Raises UserError where there is none."""
    try:
        official = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(official, dict):
        raise UserError(f"{path} holds a {type(official).__name__}, not keys and values")
    return official


def architecture_from_hf_config(config: dict[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises UserError for what has no counterpart."""
    # transformers 5 writes a Llama's rope_theta into rope_parameters.
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters={rope!r} is no section")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json: only rope_type=default is supported, not {rope}")
    config = {**rope, **config}
    load_mixers()
    if "mixers" in config:
        return _architecture_of_pattern({**_DEFAULTS, **config})
    for mixer in MIXERS.values():
        options = mixer.options_of_hf_model({**_DEFAULTS, **config})
        if options is not None:
            defaults = mixer.hf_defaults
            sizes = mixer.sizes_of_hf_model({**_DEFAULTS, **defaults, **config})
            model = _model(sizes, [mixer.name])
            return _checked(model, {mixer.name: options})
    raise UserError(
        f"config.json: no mixer reads model_type={config.get('model_type')}; docs/huggingface.md "
        "lists the forms"
    )


def _architecture_of_pattern(config: dict[str, Any]) -> Architecture:
    """Return the architecture of a config.json with `layer_types` and `mixers`."""
    kinds, given = config.get("layer_types"), config["mixers"]
    modules = config.get("mixer_modules", [])
    if not _is_names(kinds) or not isinstance(given, dict) or not set(kinds) <= set(given):
        raise UserError("config.json: layer_types and mixers do not fit each other")
    if modules and not _is_names(modules):
        raise UserError("config.json: mixer_modules is no list of names")
    try:
        check_known(kinds)
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    options = {}
    for name in dict.fromkeys(kinds):
        known = {field.name for field in dataclasses.fields(MIXERS[name].Options)}
        if not isinstance(given[name], dict) or not set(given[name]) <= known:
            raise UserError(f"config.json: mixers.{name} holds other keys than {', '.join(known)}")
        options[name] = MIXERS[name].Options(**given[name])
    model = _model(config, _shortest_pattern(kinds))
    if model.num_layers != len(kinds):
        raise UserError("config.json: layer_types is not num_hidden_layers long")
    return _checked(dataclasses.replace(model, mixer_modules=modules or []), options)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _shortest_pattern(kinds: list[str]) -> list[str]:
    """Return the shortest list that, repeated, gives these layers."""
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)


def _model(config: dict[str, Any], pattern: list[str]) -> ModelConfig:
    if config["hidden_act"] not in ("silu", "swish"):  # two names of one function
        raise UserError("config.json: only hidden_act=silu is supported")
    if not isinstance(config["tie_word_embeddings"], bool):
        raise UserError("config.json: tie_word_embeddings is not true or false")
    fields = {}
    for field, (key, kind) in _SIZES.items():
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise UserError(f"config.json: {key}={value!r} is no positive {kind.__name__}")
        fields[field] = kind(value)
    if fields["hidden_size"] % fields["num_heads"]:
        raise UserError(
            f"config.json: hidden_size={fields['hidden_size']} is not divisible by "
            f"num_attention_heads={fields['num_heads']}"
        )
    return ModelConfig(pattern=pattern, tie_word_embeddings=config["tie_word_embeddings"], **fields)


def _checked(model: ModelConfig, mixers: dict[str, Any]) -> Architecture:
    """Return the architecture of these sections. Raises UserError for options out of range or of
    another type than is declared."""
    architecture = Architecture(model, mixers)
    for name, options in mixers.items():
        for option, kind in get_type_hints(type(options)).items():
            value = getattr(options, option)
            if kind is float and type(value) is int:
                setattr(options, option, float(value))
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"config.json: {option}={value!r} of {name} is of another type")
        try:
            MIXERS[name].validate(architecture.dims, options)
        except UserError as error:
            raise UserError(f"config.json: {error}") from None
    return architecture


def is_llama(architecture: Architecture) -> bool:
    """Whether a model is a Llama to Hugging Face, whose code transformers has."""
    form = architecture.hf_form
    return form is not None and form.model_type == "llama"


def hf_config_of(architecture: Architecture) -> dict[str, Any]:
    """Return config.json's description of an architecture: nothing about tokens or dtype."""
    model, form = architecture.model, architecture.hf_form
    own_keys = form.size_keys if form else {}
    config = {
        **{own_keys.get(key, key): getattr(model, field) for field, (key, _) in _SIZES.items()},
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
    }
    if form is not None:
        return {**config, "model_type": form.model_type, **form.keys}
    mixers = {name: dataclasses.asdict(options) for name, options in architecture.mixers.items()}
    config |= {"model_type": "ttt", **model_classes(), "layer_types": architecture.layer_kinds}
    config["mixers"] = mixers
    return {**config, "mixer_modules": model.mixer_modules} if model.mixer_modules else config
