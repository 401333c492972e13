"""Hugging Face's tensors and ours (docs/huggingface.md), by the table of a model's parameters.

Both directions work on global tensors, those of one process without parallelism. The format of the
Transformer baseline is Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.layers.parameters import gather_global
from megatron_ttt.mixers.base import Parameter
from megatron_ttt.model import global_parameters
from megatron_ttt.stack import Architecture


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return every Hugging Face tensor of a model and its shape."""
    table = architecture.parameters()
    return {k: v for row in table.values() for k, v in row.hf_shapes().items()}


def split(row: Parameter, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors, by name, that our global tensor of a parameter is made of.

    The rows that pad the vocabulary are left out.
    """
    return zip(row.hf_names, row.split(tensor[: row.shape[0]]))


def join(row: Parameter, read: Callable[[str], Tensor]) -> Tensor:
    """Return our global tensor of a parameter; `read` gives Hugging Face tensors by name."""
    return row.join([read(name) for name in row.hf_names])


def to_hf(architecture: Architecture, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return Hugging Face's tensors for global tensors under our names."""
    table = architecture.parameters()
    return {hf: part for name, tensor in named for hf, part in split(table[name], tensor)}


def gather_hf(
    chunks: list[nn.Module], architecture: Architecture, tensor_of: Callable[[nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of the whole model, put together from every rank's parts.

    tensor_of: what of a parameter is wanted (its data, its gradient). Collective; every rank gets
    everything, so this is for models that fit one rank.
    """
    own = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            own[name] = gather_global(parameter, tensor_of(parameter).detach()).cpu()
    stages = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return to_hf(architecture, {k: v for stage in stages for k, v in stage.items()}.items())
