"""Flat ranges as boxes: each element once, in order, and few boxes; parts of what is stored."""

import io

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ttt.checkpoint.boxes import boxes, cut
from megatron_ttt.checkpoint.reader import _read_part


@pytest.mark.parametrize("shape", [(7,), (5, 6), (1, 4), (4, 1), (3, 4, 5), (2, 3, 1, 4), ()])
def test_a_range_is_cut_into_few_boxes(shape):
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    for start in range(whole.size + 1):
        for stop in range(start, whole.size + 1):
            found = boxes(shape, start, stop)
            parts = [
                whole[tuple(slice(at, at + n) for at, n in zip(box.offsets, box.sizes))]
                for box in found
            ]
            elements = [number for part in parts for number in part.flatten().tolist()]
            assert elements == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def stacked(key: str, data: torch.Tensor, replica=(0, 0, 3), factory: bool = False):
    """A TP rank's rows [6, 12) of 12, in layer 2 of 5; of two parts, if it is a factory."""

    def build(key, tensor, replica_id, flattened_range):
        return [
            ShardedTensor.from_rank_offsets(
                key,
                part,
                (0, 2, 5),
                (1, 2 * index + 1, 4),
                replica_id=replica_id,
                prepend_axis_num=1,
            )
            for index, part in enumerate(tensor.chunk(2))
        ]

    if factory:
        return ShardedTensorFactory(key, data, build, torch.cat, replica)
    return ShardedTensor.from_rank_offsets(
        key, data, (0, 2, 5), (1, 1, 2), replica_id=replica, prepend_axis_num=1
    )


@pytest.mark.parametrize("factory", [False, True])
def test_every_rank_has_its_part_of_the_global_tensor(factory):
    parameter = torch.nn.Parameter(torch.arange(24.0).view(6, 4))
    entry = stacked("weight", parameter, factory=factory)
    whole = torch.full((5, 12, 4), -1.0)
    for piece in range(0, 24, 5):  # five ranks
        owned = range(piece, min(24, piece + 5))
        values = parameter.detach().view(-1)[owned.start : owned.stop]
        for part in cut(entry, owned, values, "optimizer.").values():
            at = tuple(
                slice(o, o + n) for o, n in zip(part.global_offset, part.local_shape, strict=True)
            )
            assert torch.all(whole[at] == -1.0)
            whole[at] = part.data
            assert part.key == "optimizer.weight" and part.global_shape == whole.shape
            assert part.replica_id == (0, 0, 0)
            assert part.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    expected = torch.full((5, 12, 4), -1.0)
    if factory:  # its first part is the second quarter of the rows, its second part the last
        expected[2, 3:6], expected[2, 9:12] = parameter.detach().chunk(2)
    else:
        expected[2, 6:12] = parameter.detach()
    assert torch.equal(whole, expected)
    assert cut(entry, range(0), torch.empty(0)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["plain", "transposed", "part of a larger one"])
def test_a_part_of_a_stored_tensor_is_read_alone(dtype, stored):
    base = torch.randn(9, 8, 7).to(dtype)
    tensor = {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "part of a larger one": base[2:7, :, 1:],
    }[stored]
    file = io.BytesIO()
    torch.save(tensor, file)
    rng = np.random.default_rng(0)
    for _ in range(50):
        offsets = [int(rng.integers(n + 1)) for n in tensor.shape]
        sizes = [int(rng.integers(n - at + 1)) for n, at in zip(tensor.shape, offsets)]
        expected = tensor[tuple(slice(at, at + n) for at, n in zip(offsets, sizes))]
        file.seek(0)
        assert torch.equal(_read_part(file, tuple(offsets), tuple(sizes)), expected)
    scalar = io.BytesIO()
    torch.save(torch.tensor(3.0), scalar)
    scalar.seek(0)
    assert _read_part(scalar, (), ()).item() == 3.0
