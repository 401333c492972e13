"""The table of a TTT mixer's parameters."""

from __future__ import annotations

from megatron_ttt.layers.initialisers import lecun_normal, normal, ones, zeros
from megatron_ttt.mixers.base import Dimensions, Parameter
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.options import TTTOptions

_HF = "seq_modeling_block."


def ttt_parameters(
    inner_model: InnerModel, dims: Dimensions, options: TTTOptions
) -> list[Parameter]:
    """Return the table. Names are the official checkpoints', but for in_proj and out_proj."""
    D, H, F = dims.hidden_size, dims.num_heads, dims.head_dim
    weights = normal(dims.init_std)
    parts = options.projections
    packed = tuple(f"{_HF}{part}_proj.weight" for part in parts)
    table = [Parameter("in_proj.weight", (len(parts) * D, D), weights, packed, 0)]

    def add(name, shape, initialiser, *, shard_dim=0, fp32=False, hf_name=None):
        hf_names = (_HF + (hf_name or name),)
        table.append(Parameter(name, shape, initialiser, hf_names, shard_dim, fp32))

    for conv in ("conv_q", "conv_k") if options.share_qk else ():
        kernel = lecun_normal(options.conv_kernel)
        add(f"{conv}.weight", (D, 1, options.conv_kernel), kernel)
        add(f"{conv}.bias", (D,), zeros)
    add("learnable_ttt_lr_weight", (H, 1, D), weights, fp32=True)
    add("learnable_ttt_lr_bias", (H, 1), zeros, fp32=True)
    add("learnable_token_idx", (options.mini_batch_size,), zeros, shard_dim=None, fp32=True)
    add("ttt_norm_weight", (H, F), ones, fp32=True)
    add("ttt_norm_bias", (H, F), zeros, fp32=True)
    for name, shape in inner_model.state_shapes(F).items():
        add(name, (H, *shape), weights if name.startswith("W") else zeros, fp32=True)
    add("post_norm.weight", (D,), ones)
    add("post_norm.bias", (D,), zeros)
    add("out_proj.weight", (D, D), weights, shard_dim=1, hf_name="o_proj.weight")
    return table
