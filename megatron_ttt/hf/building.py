"""The models of an architecture, without weights: transformers' and megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ttt import platform as platforms
from megatron_ttt.config import Config, TrainingConfig
from megatron_ttt.hf.configuration import hf_config_of, is_llama
from megatron_ttt.stack import Architecture


def build_hf_model(architecture: Architecture, **more: Any) -> nn.Module:
    """Return transformers' model, with initial weights; `more` goes to its config."""
    config = {k: v for k, v in hf_config_of(architecture).items() if k != "model_type"}
    if is_llama(architecture):
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**{**config, **more}))
    from megatron_ttt.hf.code import codes_of, configuration_class, load_code

    modeling = load_code(codes_of(architecture))
    return modeling.TTTForCausalLM(configuration_class(architecture)(**{**config, **more}))


def build_empty_hf_model(architecture: Architecture) -> nn.Module:
    """Return transformers' model in evaluation mode with weights on the meta device; its buffers
    have their values."""
    with torch.device("meta"):
        network = build_hf_model(architecture).eval()
    if hasattr(network.model, "rotary_emb"):  # Llama's angles
        network.model.rotary_emb = type(network.model.rotary_emb)(network.config)
    return network


def tie_head(network: nn.Module, architecture: Architecture) -> None:
    """Make the embedding's weight the head's too, where the architecture ties them."""
    if architecture.model.tie_word_embeddings:
        network.lm_head.weight = network.get_input_embeddings().weight


def build_on_cpu(architecture: Architecture, dtype: torch.dtype) -> nn.Module:
    """Return megatron-core's model on this one process's CPU, weights not set."""
    platform = platforms.start("cpu")
    platforms.start_process_group(platform)
    from megatron.core import parallel_state

    from megatron_ttt.model import build_chunk, make_transformer_config

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        platforms.seed_everything(0)
    config = Config(
        model=architecture.model,
        mixers=dict(architecture.mixers),
        training=TrainingConfig(steps=1, precision="fp32"),
    )
    return build_chunk(config, make_transformer_config(config, platform, dtype), None)
