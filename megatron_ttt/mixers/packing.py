"""How a packed projection is stored in checkpoints."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def unpacked(packed: ShardedTensor, parts: int, sharded_offsets) -> ShardedTensorFactory:
    """Store a packed projection as the plain concatenation of its whole parts.

    This rank's tensor is [part 0's rows; part 1's rows; ...], each part cut over the TP ranks. That
    is no contiguous piece of the global tensor: saved as it is, only the same TP could read it.
    """
    dim = len(sharded_offsets)
    ranks = packed.axis_fragmentations[dim]
    rank = packed.global_offset[dim] // packed.local_shape[0]

    @torch.no_grad()
    def build(key, tensor, replica_id, flattened_range):
        return [
            ShardedTensor.from_rank_offsets(
                key,
                piece,
                *sharded_offsets,
                (dim, index * ranks + rank, parts * ranks),
                replica_id=replica_id,
                prepend_axis_num=dim,
            )
            for index, piece in enumerate(tensor.chunk(parts))
        ]

    @torch.no_grad()
    def merge(pieces):
        return torch.cat(pieces)

    return ShardedTensorFactory(packed.key, packed.data, build, merge, packed.replica_id)
