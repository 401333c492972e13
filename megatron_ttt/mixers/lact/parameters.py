"""The table of a LaCT mixer's parameters."""

from __future__ import annotations

from megatron_ttt.layers.initialisers import normal, ones, zeros
from megatron_ttt.mixers.base import Dimensions, Parameter
from megatron_ttt.mixers.lact.options import LaCTOptions


def lact_parameters(dims: Dimensions, options: LaCTOptions) -> list[Parameter]:
    """Return the table. Hugging Face's names are the official checkpoints'.

    All but the projections stay in float32.
    """
    D, m = dims.hidden_size, options.fast_heads
    f, h = fast_sizes(dims, options)
    weights = normal(dims.init_std)
    table = []

    def add(name, shape, initialiser, *, shard_dim=0, fp32=True, hf_name=None):
        hf_names = (f"attn.{hf_name or name}",)
        table.append(Parameter(name, shape, initialiser, hf_names, shard_dim, fp32))

    add("in_proj.weight", (3 * D, D), weights, fp32=False, hf_name="qkv.weight")
    if options.qkv_bias:
        add("in_proj.bias", (3 * D,), zeros, fp32=False, hf_name="qkv.bias")
    for part in "qk" if options.qk_norm else "":
        add(f"{part}_norm_weight", (D,), ones, hf_name=f"{part}_norm.weight")
    add("qk_scale", (D, 2), ones)
    add("qk_offset", (D, 2), zeros)
    for name, rows, wanted, hf_name in (
        ("lr", 3 * m, True, "lr_proj"),
        ("momentum", m, options.momentum, "momentum_proj.0"),
        ("output_scale", m, options.output_scale, "ttt_scale_proj"),
    ):
        if wanted:
            add(f"{name}_weight", (rows, D), weights, hf_name=f"{hf_name}.weight")
            add(f"{name}_bias", (rows,), zeros, hf_name=f"{hf_name}.bias")
    for name in ("w0", "w2"):
        if r := options.low_rank:
            gain = options.low_rank_gain
            left, right = normal(gain * r**-0.5), normal(gain * f**-0.5)
            add(f"{name}_left", (m, h, r), left, hf_name=f"{name}.w_left")
            add(f"{name}_right", (m, r, f), right, hf_name=f"{name}.w_right")
        else:
            add(name, (m, h, f), normal(f**-0.5))
    add("w1", (m, f, h), normal(h**-0.5))
    add("ttt_norm_weight", (f,), ones, shard_dim=None, hf_name="ttt_norm.weight")
    add("out_proj.weight", (D, D), weights, shard_dim=1, fp32=False, hf_name="o_proj.weight")
    return table


def fast_sizes(dims: Dimensions, options: LaCTOptions) -> tuple[int, int]:
    """Return the widths of a fast head's input and hidden layer."""
    f = dims.hidden_size // options.fast_heads
    return f, options.hidden_multiple * f
