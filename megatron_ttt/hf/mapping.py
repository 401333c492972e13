"""Names and shapes: the official checkpoint's tensors and ours (docs/huggingface.md).

Both directions work on global tensors, those of one process without parallelism. Our packed
projections are made of official tensors, one after the other (TTT) or head by head (attention);
all else is renamed. The Transformer baseline's official format is Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.config import ModelConfig
from megatron_ttt.layers.parameters import gather_global
from megatron_ttt.model import EMBEDDING, global_parameters

_TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_TTT = {
    "pre_conv.norm.weight": "conv.norm.weight",
    "pre_conv.conv.weight": "conv.conv.weight",
    "pre_conv.conv.bias": "conv.conv.bias",
    "input_layernorm.weight": "seq_norm.weight",
    "self_attention.out_proj.weight": "seq_modeling_block.o_proj.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_ATTENTION = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV = "self_attention.linear_qkv.weight"


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model under our name, and its global shape (without padding)."""
    D, H, f = model.hidden_size, model.num_heads, model.head_dim
    width = model.ffn_hidden_size
    tails: dict[str, tuple[int, ...]] = {}
    if model.is_mamba:
        tails |= {"pre_conv.norm.weight": (D,), **_conv("pre_conv.conv", model)}
    tails["input_layernorm.weight"] = (D,)
    if model.is_ttt:
        mixer = {"in_proj.weight": (3 * D, D)}
        if model.is_mamba:
            mixer |= _conv("conv_q", model) | _conv("conv_k", model)
        mixer |= {
            "learnable_ttt_lr_weight": (H, 1, D),
            "learnable_ttt_lr_bias": (H, 1),
            "learnable_token_idx": (model.mini_batch_size,),
            "ttt_norm_weight": (H, f),
            "ttt_norm_bias": (H, f),
        }
        if model.layer == "ttt_linear":
            mixer |= {"W1": (H, f, f), "b1": (H, 1, f)}
        else:
            mixer |= {"W1": (H, f, 4 * f), "b1": (H, 1, 4 * f)}
            mixer |= {"W2": (H, 4 * f, f), "b2": (H, 1, f)}
        mixer |= {"post_norm.weight": (D,), "post_norm.bias": (D,), "out_proj.weight": (D, D)}
    else:
        mixer = {"linear_qkv.weight": (3 * D, D), "linear_proj.weight": (D, D)}
    tails |= {f"self_attention.{name}": shape for name, shape in mixer.items()}
    tails |= {
        "pre_mlp_layernorm.weight": (D,),
        "mlp.linear_fc1.weight": (2 * width, D),
        "mlp.linear_fc2.weight": (D, width),
    }
    shapes = {EMBEDDING: (model.vocab_size, D)}
    for layer in range(model.num_layers):
        shapes |= {f"decoder.layers.{layer}.{tail}": shape for tail, shape in tails.items()}
    return shapes | {"decoder.final_layernorm.weight": (D,)}


def _conv(name: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    D = model.hidden_size
    return {f"{name}.weight": (D, 1, model.conv_kernel), f"{name}.bias": (D,)}


def official_names(model: ModelConfig, name: str) -> list[str]:
    """The official tensors that our global parameter `name` is made of, in order."""
    if name in _TOP:
        return [_TOP[name]]
    _, _, number, tail = name.split(".", 3)
    prefix = f"model.layers.{number}."
    if tail == "mlp.linear_fc1.weight":
        return [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"]
    if tail == _QKV:
        return [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"]
    if tail == "self_attention.in_proj.weight":
        parts = "qvg" if model.is_mamba else "qkv"
        return [f"{prefix}seq_modeling_block.{part}_proj.weight" for part in parts]
    renamed = _TTT if model.is_ttt else _ATTENTION
    if tail in renamed:
        return [prefix + renamed[tail]]
    return [prefix + "seq_modeling_block." + tail.removeprefix("self_attention.")]


def official_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every official tensor of a model and its shape."""
    shapes = {}
    for name, shape in parameter_shapes(model).items():
        names = official_names(model, name)
        shapes |= {part: (shape[0] // len(names), *shape[1:]) for part in names}
    return shapes


def unpack(model: ModelConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our global tensor -> its official tensors, by name."""
    names = official_names(model, name)
    if name.endswith(_QKV):
        # Rows lie head by head: a head's queries, keys, values, then the next head's.
        parts = tensor.unflatten(0, (model.num_heads, 3, -1)).unbind(1)
        return zip(names, [part.flatten(0, 1) for part in parts])
    if name == EMBEDDING:
        tensor = tensor[: model.vocab_size]
    return zip(names, tensor.chunk(len(names)))


def pack(model: ModelConfig, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """The inverse of `unpack`; `read` gives official tensors by name."""
    parts = [read(part) for part in official_names(model, name)]
    if name.endswith(_QKV):
        heads = [part.unflatten(0, (model.num_heads, -1)) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_official(model: ModelConfig, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Global tensors under our names -> under the official ones."""
    return {
        official: part for name, tensor in named for official, part in unpack(model, name, tensor)
    }


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
