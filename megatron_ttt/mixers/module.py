"""A megatron-core self-attention submodule around a mixer: projections, refusals, checkpoints.

Legend: S tokens, B batch, D hidden size, H heads of this rank, L tokens as a scan counts them
(= S, gathered), F head_dim.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
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

from megatron_ttt.layers.norm import PostNorm
from megatron_ttt.layers.parameters import (
    KeepsFloat32,
    ParameterHolder,
    new_parameter,
    tensor_parallel_group,
)
from megatron_ttt.mixers.base import Dimensions, Mixer, Parameter
from megatron_ttt.mixers.packing import unpacked
from megatron_ttt.mixers.refusals import refuse_arguments, refuse_config, refuse_mask


@dataclass
class Projections:
    """The projections: in_proj is column parallel and packed, out_proj row parallel."""

    in_proj: ModuleSpec | type = None
    out_proj: ModuleSpec | type = None


def mixer_spec(
    module: type[MixerModule], mixer: Mixer, options: Any, scan_backend: str
) -> ModuleSpec:
    """Return the spec of a mixer's module in the place of self-attention."""
    return ModuleSpec(
        module=module,
        params={"mixer": mixer, "options": options, "scan_backend": scan_backend},
        submodules=Projections(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )


class MixerModule(KeepsFloat32, MegatronModule):
    """Project the input to the packed parts, `mix` them, and project the result back.

    A subclass names the parts and mixes them. The mixer's table has the rows `in_proj.weight` and
    `out_proj.weight`, and `in_proj.bias` where the projection has one; the rows without a dot are
    parameters of the module itself. Sizes are those of the TransformerConfig. Own parameters stay
    in float32 whatever half precision the model is cast to. cp_comm_type, pp_layer_offset and name
    are what megatron-core gives to attention; nothing here depends on them.

    Raises:
        UserError: the configuration asks for what these layers cannot do.
    """

    def __init__(
        self,
        config,
        submodules: Projections,
        layer_number: int,
        *,
        mixer: Mixer,
        options: Any,
        scan_backend: str = "auto",
        pg_collection=None,
        cp_comm_type=None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        refuse_config(config)
        self.mixer, self.options, self.scan_backend = mixer, options, scan_backend
        self.layer_number = layer_number
        dims = Dimensions(config.hidden_size, config.num_attention_heads, config.init_method_std)
        mixer.validate(dims, options)
        tp_group = self.tp_group = tensor_parallel_group(pg_collection and pg_collection.tp)
        D, self.head_dim = dims.hidden_size, dims.head_dim
        self.num_local_heads = dims.num_heads // tp_group.size()
        self.parts = self.part_names(options)
        self.table = {row.name: row for row in mixer.parameters(dims, options)}
        # x is gathered (or copied) once for the projection and the gates, so that in_proj sees
        # whole sequences and leaves the reduction of their gradient to that one place.
        gathered_config = copy.copy(config)
        gathered_config.sequence_parallel = False
        self.in_proj = build_module(
            submodules.in_proj,
            D,
            len(self.parts) * D,
            config=gathered_config,
            init_method=config.init_method,
            bias="in_proj.bias" in self.table,
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
        for row in self.table.values():
            if "." not in row.name:
                self.register_parameter(row.name, self.new_parameter(row))

    @staticmethod
    @abstractmethod
    def part_names(options: Any) -> tuple[str, ...]:
        """Return the names of the parts that the input is projected to, as in_proj packs them."""

    @abstractmethod
    def mix(self, x_SBD: Tensor, part: dict[str, Tensor]) -> Tensor:
        """Return what out_proj projects back, [S, B, columns of this rank].

        x: the whole input. part: its projections by name, [S, B, columns of this rank] each.
        """

    def new_parameter(self, row: Parameter) -> torch.nn.Parameter:
        """Return this rank's part of a row of the table."""
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
        projected, _ = self.in_proj(x_SBD)
        part = dict(zip(self.parts, projected.chunk(len(self.parts), dim=-1)))
        return self.out_proj(self.mix(x_SBD, part))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, **_):
        """megatron-core's map from this rank's tensors to the checkpoint's global ones."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        shard_dims = {name: self.table[name].shard_dim for name in own}
        shard_dims = {name: dim for name, dim in shard_dims.items() if dim is not None}
        sharded = make_sharded_tensors_for_checkpoint(
            own, prefix, shard_dims, sharded_offsets, **groups
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
        for name, _ in self.in_proj.named_parameters():
            key = f"{prefix}in_proj.{name}"
            sharded[key] = unpacked(sharded[key], len(self.parts), sharded_offsets)
        return sharded


def split_heads(x_SBD: Tensor, heads: int) -> Tensor:
    """[S, B, H*F] -> [B, H, L, F]."""
    return x_SBD.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
