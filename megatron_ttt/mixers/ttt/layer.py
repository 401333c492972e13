"""The TTT mixer: a megatron-core self-attention submodule whose hidden state is a trained model.

The mathematics is in docs/mathematics.md (paper: arXiv 2407.04620, section 2). Everything between
the input and the output projection belongs to one head, except the post-norm, so heads are what
tensor parallelism cuts. Legend: S tokens, B batch, D hidden size, H heads of this rank, F head_dim,
L tokens as the scan counts them (= S, gathered), K mini-batch size.
"""

from __future__ import annotations

import copy
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

from megatron_ttt.layers.norm import PostNorm, statistics_dtype
from megatron_ttt.layers.parameters import (
    KeepsFloat32,
    ParameterHolder,
    new_parameter,
    tensor_parallel_group,
)
from megatron_ttt.mixers.base import Dimensions, Parameter
from megatron_ttt.mixers.inner_loop import InnerLoop
from megatron_ttt.mixers.ttt.options import TTTOptions
from megatron_ttt.mixers.ttt.packing import unpacked
from megatron_ttt.mixers.ttt.refusals import refuse_arguments, refuse_config, refuse_mask
from megatron_ttt.mixers.ttt.scan import ttt_scan
from megatron_ttt.mixers.ttt.statistics import inner_statistics
from megatron_ttt.ops.conv_rope import conv_rope
from megatron_ttt.ops.rope import mini_batch_angles, rotate_pairs

if TYPE_CHECKING:
    from megatron_ttt.mixers.ttt.inner_model import InnerModel
    from megatron_ttt.mixers.ttt.mixer import TTT


@dataclass
class TTTMixerSubmodules:
    """The projections: in_proj is column parallel and packed, out_proj row parallel."""

    in_proj: ModuleSpec | type = None
    out_proj: ModuleSpec | type = None


def ttt_mixer_spec(
    mixer: TTT, options: TTTOptions, scan_backend: str, module: type[TTTMixer] | None = None
) -> ModuleSpec:
    """Return the spec of the mixer in the place of self-attention; module: None for TTTMixer."""
    return ModuleSpec(
        module=module or TTTMixer,
        params={"mixer": mixer, "options": options, "scan_backend": scan_backend},
        submodules=TTTMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )


class TTTMixer(KeepsFloat32, MegatronModule, InnerLoop):
    """TTT-Linear or TTT-MLP in the place of self-attention.

    Its sizes are those of the TransformerConfig. Own parameters stay in float32 whatever half
    precision the model is cast to. scan_backend: see `ttt_scan`. cp_comm_type, pp_layer_offset and
    name are what megatron-core gives to attention; nothing here depends on them.

    Raises:
        UserError: the configuration asks for what TTT layers cannot do.
    """

    def __init__(
        self,
        config,
        submodules: TTTMixerSubmodules,
        layer_number: int,
        *,
        mixer: TTT,
        options: TTTOptions,
        scan_backend: str = "auto",
        pg_collection=None,
        cp_comm_type=None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        refuse_config(config)
        self.options, self.layer_number, self.scan_backend = options, layer_number, scan_backend
        self.mixer = mixer
        dims = Dimensions(config.hidden_size, config.num_attention_heads, config.init_method_std)
        mixer.validate(dims, options)
        tp_group = self.tp_group = tensor_parallel_group(pg_collection and pg_collection.tp)
        self.head_dim = dims.head_dim
        self.num_local_heads = dims.num_heads // tp_group.size()
        D, self.parts = dims.hidden_size, options.projections
        # x is gathered (or copied) once for the projection and the lr gate, so that in_proj sees
        # whole sequences and leaves the reduction of their gradient to that one place.
        gathered_config = copy.copy(config)
        gathered_config.sequence_parallel = False
        self.in_proj = build_module(
            submodules.in_proj,
            D,
            len(self.parts) * D,
            config=gathered_config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            disable_grad_reduce=True,
            stride=len(self.parts),
            tp_group=tp_group,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            D,
            D,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.post_norm = PostNorm(config, D, tp_group=tp_group)
        table = mixer.parameters(dims, options)
        for conv in ("conv_q", "conv_k") if options.share_qk else ():
            own = [row for row in table if row.name.startswith(f"{conv}.")]
            setattr(self, conv, ParameterHolder(**{_tail(row): self._new(row) for row in own}))
        self.shard_dims = {row.name: row.shard_dim for row in table if row.shard_dim is not None}
        for row in table:
            if "." not in row.name:
                self.register_parameter(row.name, self._new(row))
        self.state_names = list(mixer.inner_model.state_shapes(dims.head_dim))

    def _new(self, row: Parameter) -> torch.nn.Parameter:
        return new_parameter(
            self.config,
            row.shape,
            row.initialiser,
            shard_dim=row.shard_dim,
            fp32=row.fp32,
            tp_group=self.tp_group,
        )

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
        a TTT layer has its own, within mini-batches.

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
        if self.config.sequence_parallel:
            x_SBD = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, group=self.tp_group
            )
        else:
            x_SBD = tensor_parallel.copy_to_tensor_model_parallel_region(
                hidden_states, group=self.tp_group
            )
        projected, _ = self.in_proj(x_SBD)
        part = dict(zip(self.parts, projected.chunk(len(self.parts), dim=-1)))
        angles = mini_batch_angles(
            self.options.mini_batch_size,
            self.head_dim,
            self.options.rope_theta,
            statistics_dtype(x_SBD),
            x_SBD.device,
        )
        if self.options.share_qk:
            q, k = conv_rope(part["q"], [self.conv_q(), self.conv_k()], *angles)
        else:
            q, k = (rotate_pairs(self._split_heads(part[name]), *angles) for name in "qk")
        inputs = (
            q,
            k,
            self._split_heads(part["v"]),
            self.inner_learning_rate(x_SBD),
            self.token_scale(),
            self.ttt_norm_weight,
            self.ttt_norm_bias,
            tuple(getattr(self, name) for name in self.state_names),
        )
        if self.observer is not None:
            cos, sin = angles
            unrotated = rotate_pairs(k, cos, -sin)
            self.observer(inner_statistics(self.inner_model(), *inputs[1:], unrotated))
        out_BHLF, _ = ttt_scan(self.inner_model(), *inputs, backend=self.scan_backend)
        out_SBD = out_BHLF.permute(2, 0, 1, 3).flatten(2)
        return self.out_proj(self.post_norm(out_SBD, part.get("g")))

    def inner_model(self) -> InnerModel:
        """Return the model that the scan trains; a subclass may give it parameters of its own."""
        return self.mixer.inner_model

    def _split_heads(self, x_SBD: Tensor) -> Tensor:
        """[S, B, H*F] -> [B, H, L, F]."""
        return x_SBD.unflatten(-1, (self.num_local_heads, -1)).permute(1, 2, 0, 3)

    def inner_learning_rate(self, x_SBD: Tensor) -> Tensor:
        """lam [B, H, L]: base * sigmoid(x . w + c) / f, in the gate's dtype (at least float32)."""
        weight_HD = self.learnable_ttt_lr_weight.squeeze(1)
        logits = F.linear(
            x_SBD.to(weight_HD.dtype), weight_HD, self.learnable_ttt_lr_bias.squeeze(1)
        )
        scale = self.options.base_lr * self.inner_lr_scale / self.head_dim
        return scale * torch.sigmoid(logits).permute(1, 2, 0)

    def token_scale(self) -> Tensor:
        """tau [K]: max(1/i + delta_i, 0).

        delta is replicated, but this rank's heads give only their share of its gradient: the copy
        region sums the shares. (megatron-core's attributes would average them, or do nothing.)
        """
        delta = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.learnable_token_idx, group=self.tp_group
        )
        # 1/i is a float32 number in the official models, in float64 ones too.
        index = torch.arange(1, len(delta) + 1, dtype=torch.float32, device=delta.device)
        return torch.clamp_min(index.reciprocal().to(delta.dtype) + delta, 0.0)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, **_):
        """megatron-core's map from this rank's tensors to the checkpoint's global ones."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        per_head = {name: self.shard_dims[name] for name in own if name in self.shard_dims}
        sharded = make_sharded_tensors_for_checkpoint(
            own, prefix, per_head, sharded_offsets, **groups
        )
        for name, module in self.named_children():
            child_prefix = f"{prefix}{name}."
            if isinstance(module, ParameterHolder | PostNorm):
                shard_dims = {key: 0 for key, _ in module.named_parameters()}
                child = make_sharded_tensors_for_checkpoint(
                    module.state_dict(keep_vars=True),
                    child_prefix,
                    shard_dims,
                    sharded_offsets,
                    **groups,
                )
            else:
                child = sharded_state_dict_default(module, child_prefix, sharded_offsets, metadata)
            sharded.update(child)
        key = f"{prefix}in_proj.weight"
        sharded[key] = unpacked(sharded[key], len(self.parts), sharded_offsets)
        return sharded


def _tail(row: Parameter) -> str:
    return row.name.rsplit(".", 1)[1]
