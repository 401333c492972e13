"""The LaCT mixer: a megatron-core self-attention submodule of fast weights and windowed attention.

Both read the same queries, keys and values. Fast head j spans the attention heads from j H/m on,
so tensor parallelism cuts both between the same columns. Legend: S tokens, B batch, D hidden size,
H attention heads and m fast heads of this rank, L tokens as the scan counts them (= S, gathered).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from megatron_ttt.layers.norm import rms_norm, statistics_dtype
from megatron_ttt.layers.parameters import (
    KeepsFloat32,
    new_parameter,
    tensor_parallel_group,
)
from megatron_ttt.mixers.base import Dimensions
from megatron_ttt.mixers.lact.inputs import (
    fast_input,
    rotary_angles,
    rotate_halves,
    split_heads,
)
from megatron_ttt.mixers.lact.options import LaCTOptions
from megatron_ttt.mixers.lact.reference import NORM_EPS, reference_scan
from megatron_ttt.mixers.lact.scan import lact_scan
from megatron_ttt.mixers.ttt.packing import unpacked
from megatron_ttt.mixers.ttt.refusals import refuse_arguments, refuse_config, refuse_mask
from megatron_ttt.ops.windowed_attention import windowed_attention

if TYPE_CHECKING:
    from megatron_ttt.mixers.lact.mixer import LaCT

BASE_LR = 0.001
LR_SHIFT = BASE_LR + math.log(-math.expm1(-BASE_LR))
"""The inverse of softplus at the learning rate that a projection of 0 stands for."""
SCANS = {"auto": lact_scan, "torch": lact_scan, "naive": reference_scan}
"""The scan by `training.scan_backend`."""


@dataclass
class LaCTMixerSubmodules:
    """The projections: qkv is column parallel and packed, o_proj row parallel."""

    qkv: ModuleSpec | type = None
    o_proj: ModuleSpec | type = None


def lact_mixer_spec(mixer: LaCT, options: LaCTOptions, scan_backend: str) -> ModuleSpec:
    """Return the spec of the mixer in the place of self-attention."""
    return ModuleSpec(
        module=LaCTMixer,
        params={"mixer": mixer, "options": options, "scan_backend": scan_backend},
        submodules=LaCTMixerSubmodules(qkv=ColumnParallelLinear, o_proj=RowParallelLinear),
    )


class LaCTMixer(KeepsFloat32, MegatronModule):
    """LaCT in the place of self-attention.

    Its sizes are those of the TransformerConfig. Own parameters stay in float32 whatever half
    precision the model is cast to. cp_comm_type, pp_layer_offset and name are what megatron-core
    gives to attention; nothing here depends on them.

    Raises:
        UserError: the configuration asks for what TTT layers cannot do.
    """

    def __init__(
        self,
        config,
        submodules: LaCTMixerSubmodules,
        layer_number: int,
        *,
        mixer: LaCT,
        options: LaCTOptions,
        scan_backend: str = "auto",
        pg_collection=None,
        cp_comm_type=None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        refuse_config(config)
        self.options, self.layer_number = options, layer_number
        self.scan = SCANS[scan_backend]
        dims = Dimensions(config.hidden_size, config.num_attention_heads, config.init_method_std)
        tp_group = self.tp_group = tensor_parallel_group(pg_collection and pg_collection.tp)
        D, self.head_dim = dims.hidden_size, dims.head_dim
        self.num_local_heads = dims.num_heads // tp_group.size()
        self.num_local_fast_heads = options.fast_heads // tp_group.size()
        # x is gathered (or copied) once for the projection and the gates, so that qkv sees whole
        # sequences and leaves the reduction of their gradient to that one place.
        gathered_config = copy.copy(config)
        gathered_config.sequence_parallel = False
        self.qkv = build_module(
            submodules.qkv,
            D,
            3 * D,
            config=gathered_config,
            init_method=config.init_method,
            bias=options.qkv_bias,
            gather_output=False,
            skip_bias_add=False,
            disable_grad_reduce=True,
            stride=3,
            tp_group=tp_group,
        )
        self.o_proj = build_module(
            submodules.o_proj,
            D,
            D,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.shard_dims = {}
        for row in mixer.parameters(dims, options):
            if "." in row.name:  # a projection's
                continue
            parameter = new_parameter(
                config,
                row.shape,
                row.initialiser,
                shard_dim=row.shard_dim,
                fp32=row.fp32,
                tp_group=tp_group,
            )
            self.register_parameter(row.name, parameter)
            if row.shard_dim is not None:
                self.shard_dims[row.name] = row.shard_dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        key_value_states=None,
        inference_context=None,
        inference_params=None,
        packed_seq_params=None,
        attention_bias=None,
        sequence_len_offset=None,
        rotary_pos_emb=None,
        rotary_pos_cos=None,
        rotary_pos_sin=None,
        rotary_pos_cos_sin=None,
    ) -> tuple[Tensor, None]:
        """[S, B, D] (S this rank's under sequence parallelism) -> the same, and no bias.

        Arguments are those of megatron-core's attention. The model's rotary embedding is not used:
        the layer has its own.

        Raises:
            UserError: a mask that is not causal, or any other argument but the rotary embedding.
        """
        refuse_arguments(
            key_value_states=key_value_states,
            inference_context=inference_context,
            inference_params=inference_params,
            packed_seq_params=packed_seq_params,
            attention_bias=attention_bias,
            sequence_len_offset=sequence_len_offset,
        )
        refuse_mask(attention_mask)
        gather = (
            tensor_parallel.gather_from_sequence_parallel_region
            if self.config.sequence_parallel
            else tensor_parallel.copy_to_tensor_model_parallel_region
        )
        x_SBD = gather(hidden_states, group=self.tp_group)
        q, k, v = self.qkv(x_SBD)[0].chunk(3, dim=-1)
        if self.options.qk_norm:
            q, k = self.norm(q, self.q_norm_weight), self.norm(k, self.k_norm_weight)
        angles = rotary_angles(
            len(q), self.head_dim, self.options.rope_theta, statistics_dtype(q), q.device
        )
        out_SBD = self.attend(q, k, v, angles) + self.run_fast_weights(x_SBD, q, k, v, angles)
        return self.o_proj(out_SBD)

    def norm(self, x_SBD: Tensor, weight_D: Tensor) -> Tensor:
        """RMSNorm over the hidden size, of which each TP rank has its heads' columns."""
        x = x_SBD.to(weight_D.dtype)
        squares = x.square().sum(-1, keepdim=True)
        # Each rank uses the sum, so its gradient is summed over the ranks too.
        squares = tensor_parallel.copy_to_tensor_model_parallel_region(
            tensor_parallel.reduce_from_tensor_model_parallel_region(squares, group=self.tp_group),
            group=self.tp_group,
        )
        mean = squares / self.config.hidden_size
        return (x * torch.rsqrt(mean + NORM_EPS) * weight_D).to(x_SBD.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention's output [S, B, columns of this rank]."""
        q, k, v = (split_heads(x, self.num_local_heads) for x in (q, k, v))
        q, k = rotate_halves(q, *angles), rotate_halves(k, *angles)
        out_BHLF = windowed_attention(q, k, v, self.options.window)
        return out_BHLF.permute(2, 0, 1, 3).flatten(2)

    def run_fast_weights(self, x_SBD, q, k, v, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the fast weights' output [S, B, columns of this rank], normalised and scaled."""
        options, heads = self.options, self.num_local_fast_heads
        q, k = (
            fast_input(
                part,
                heads,
                self.qk_scale[:, i],
                self.qk_offset[:, i],
                silu=options.silu,
                angles=angles if options.fast_rope else None,
            )
            for i, part in enumerate((q, k))
        )
        if options.silu and options.value_silu:
            v = F.silu(v)
        x_wide = x_SBD.to(self.lr_weight.dtype)
        # Rates are float32 numbers in the official models, in float64 ones too.
        lr = F.softplus(self.gate(x_wide, "lr").float() + LR_SHIFT)  # [B, L, 3 m]
        beta = None
        if options.momentum:
            beta = self.gate(x_wide, "momentum").sigmoid().float().transpose(1, 2).contiguous()
        out_BHLF = self.scan(
            q,
            k,
            split_heads(v, heads),
            lr.unflatten(-1, (heads, 3)).transpose(1, 2),
            beta,
            self.fast_weights(),
            chunk_size=options.chunk_size,
            muon=options.muon,
            pre_norm=options.pre_norm,
        )
        # The norm is replicated, but this rank's heads give only their share of its gradient.
        weight_F = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.ttt_norm_weight, group=self.tp_group
        )
        out_BHLF = rms_norm(out_BHLF.to(weight_F.dtype), weight_F, NORM_EPS)
        if options.output_scale:
            scale_BLH = F.silu(self.gate(x_wide, "output_scale"))
            out_BHLF = out_BHLF * scale_BLH.transpose(1, 2).unsqueeze(-1)
        return out_BHLF.permute(2, 0, 1, 3).flatten(2).to(x_SBD.dtype)

    def gate(self, x_SBD: Tensor, name: str) -> Tensor:
        """Return a projection of the input to numbers of each fast head, [B, L, numbers]."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.linear(x_SBD, weight, bias).transpose(0, 1).contiguous()

    def fast_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W0, W1 and W2 [m, ...] that a sequence starts from."""
        if not self.options.low_rank:
            return self.w0, self.w1, self.w2
        half = torch.eye(*self.w1.shape[:-3:-1], dtype=self.w1.dtype, device=self.w1.device) / 2
        W0, W2 = self.w0_left @ self.w0_right + half, self.w2_left @ self.w2_right + half
        return W0, self.w1, W2

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, **_):
        """megatron-core's map from this rank's tensors to the checkpoint's global ones."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            self.shard_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata
            )
        for name, _ in self.qkv.named_parameters():
            key = f"{prefix}qkv.{name}"
            sharded[key] = unpacked(sharded[key], 3, sharded_offsets)
        return sharded
