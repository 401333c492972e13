"""Flat ranges of a parameter as boxes of its global tensor.

The distributed optimizer gives each data-parallel rank a flat range of each bucket, and so flat
ranges of some parameters. A flat range of a matrix is the end of a row, whole rows and the start of
a row: three boxes, which a checkpoint stores as parts of the global tensor. Each rank then writes
and reads what it owns, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


class Box(NamedTuple):
    """A part of a tensor: where it begins, and its extent, in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a contiguous tensor, in order, as at most 2 N - 1 boxes."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        return list(_in_row(shape, last, start - last * row, stop - last * row))
    found = []
    if start < first * row:
        found += _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        rest = shape[1:]
        found.append(Box((first, *(0 for _ in rest)), (last - first, *rest)))
    if last * row < stop:
        found += _in_row(shape, last, 0, stop - last * row)
    return found


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield Box((row, *offsets), (1, *sizes))


def cut(
    entry: ShardedTensor | ShardedTensorFactory, owned: range, values: Tensor, prefix: str = ""
) -> dict[str, ShardedTensor]:
    """The part of a checkpoint's entry that one data-parallel rank owns.

    entry: of a parameter, which is its `data`. owned: the rank's flat range of the parameter.
    values: what is stored for it, flat; the results are views of it. prefix: of the stored names.
    Returns ShardedTensors of boxes, under their numbers.
    """
    parameter = entry.data
    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    found = []
    for box in boxes(tuple(parameter.shape), owned.start, owned.stop):
        content, values = values[: prod(box.sizes)].view(box.sizes), values[prod(box.sizes) :]
        for part in nested_values(parts):
            if (common := _intersection(box, _box_of(part.data, parameter))) is not None:
                found.append(
                    _as_part(part, parameter, common, _narrow(content, box, common), prefix)
                )
    return {str(number): tensor for number, tensor in enumerate(found)}


def _as_part(
    part: ShardedTensor, parameter: Tensor, box: Box, content: Tensor, prefix: str
) -> ShardedTensor:
    """A box of the parameter, within `part`, as a box of the global tensor."""
    lead = part.prepend_axis_num
    within = [at - start for at, start in zip(box.offsets, _box_of(part.data, parameter).offsets)]
    offsets = (0,) * lead + tuple(within)
    sizes = (1,) * lead + box.sizes
    return ShardedTensor(
        key=prefix + part.key,
        data=content.view(sizes),
        dtype=content.dtype,
        local_shape=sizes,
        global_shape=part.global_shape,
        global_offset=tuple(a + b for a, b in zip(part.global_offset, offsets)),
        axis_fragmentations=None,  # boxes are of many sizes
        # Of a parameter's copies over data-parallel ranks, which its last number counts, each rank
        # has another part here.
        replica_id=(*part.replica_id[:-1], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _box_of(view: Tensor, whole: Tensor) -> Box:
    """Which part of a contiguous tensor a view of it is."""
    if view.stride() != whole.stride() or not whole.is_contiguous():
        raise ValueError("a part of a parameter is no box of it")
    start = view.storage_offset() - whole.storage_offset()
    offsets = torch.unravel_index(torch.tensor(start), whole.shape) if whole.dim() else ()
    return Box(tuple(int(at) for at in offsets), tuple(view.shape))


def _intersection(one: Box, other: Box) -> Box | None:
    offsets = tuple(max(a, b) for a, b in zip(one.offsets, other.offsets))
    ends = [
        min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes)
    ]
    sizes = tuple(end - start for end, start in zip(ends, offsets))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def _narrow(content: Tensor, box: Box, inner: Box) -> Tensor:
    for dim, (at, start, size) in enumerate(zip(inner.offsets, box.offsets, inner.sizes)):
        content = content.narrow(dim, at - start, size)
    return content
