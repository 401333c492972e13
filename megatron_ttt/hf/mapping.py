"""Names: the official checkpoint's tensors and ours (docs/mathematics.md, checkpoint format).

Both directions work on global tensors, those of one process without parallelism. Our packed
projections are row-wise concatenations of official tensors; all else is renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.parameters import gather_global, global_shape, local_shard
from megatron_ttt.model import EMBEDDING, global_parameters

_TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_LAYER = {
    "input_layernorm.weight": "seq_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "pre_conv.norm.weight": "conv.norm.weight",
    "pre_conv.conv.weight": "conv.conv.weight",
    "pre_conv.conv.bias": "conv.conv.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "self_attention.out_proj.weight": "seq_modeling_block.o_proj.weight",
}


def official_names(model: ModelConfig, name: str) -> list[str]:
    """The official tensors that our global parameter `name` is made of, in row order."""
    if name in _TOP:
        return [_TOP[name]]
    _, _, number, tail = name.split(".", 3)
    prefix = f"model.layers.{number}."
    if tail == "mlp.linear_fc1.weight":
        return [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"]
    if tail == "self_attention.in_proj.weight":
        parts = "qvg" if model.is_mamba else "qkv"
        return [f"{prefix}seq_modeling_block.{part}_proj.weight" for part in parts]
    if tail in _LAYER:
        return [prefix + _LAYER[tail]]
    return [prefix + "seq_modeling_block." + tail.removeprefix("self_attention.")]


def to_official(model: ModelConfig, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Global tensors under our names -> under the official ones."""
    official = {}
    for name, tensor in named:
        if name == EMBEDDING:
            tensor = tensor[: model.vocab_size]
        names = official_names(model, name)
        official.update(zip(names, tensor.chunk(len(names))))
    return official


@torch.no_grad()
def load_official(chunk: nn.Module, model: ModelConfig, official: dict[str, Tensor]) -> None:
    """Fill this rank's chunk with its parts of official global tensors.

    Raises KeyError for a tensor that is missing, ValueError for one of another shape.
    """
    for name, parameter in global_parameters(chunk):
        names = official_names(model, name)
        whole = torch.cat([official[part] for part in names])
        shape = global_shape(parameter)
        if name == EMBEDDING:
            padding = whole.new_zeros((shape[0] - len(whole), *whole.shape[1:]))
            whole = torch.cat([whole, padding])
        if whole.shape != shape:
            raise ValueError(f"{', '.join(names)}: {tuple(whole.shape)}, not {tuple(shape)}")
        parameter.copy_(local_shard(parameter, whole))


def gather_official(
    chunks: list[nn.Module], model: ModelConfig, tensor_of: Callable[[nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """Official global tensors of the whole model, put together from every rank's parts.

    tensor_of: what of a parameter is wanted (its data, its gradient). Collective; every rank gets
    everything, so this is for models that fit one rank.
    """
    own = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            own[name] = gather_global(parameter, tensor_of(parameter).detach()).cpu()
    stages = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return to_official(model, {k: v for stage in stages for k, v in stage.items()}.items())
