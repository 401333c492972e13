"""Writing safetensors one tensor at a time; the library's own writer wants a whole file in memory.

The format (https://github.com/huggingface/safetensors): the header's length in 8 bytes, a JSON
header of dtype, shape and byte range of each tensor, the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_safetensors(
    folder: Path, tensors: Shapes, read: Callable[[str], Tensor], shard_bytes: int
) -> None:
    """Write model.safetensors, or model-0000i-of-0000N.safetensors and their index.

    tensors: name -> (dtype, shape), in the order they are written (and `read`). shard_bytes: the
    size above which a new file is begun; a larger tensor has a file of its own.
    """
    shards: list[Shapes] = [{}]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + _bytes(entry) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += _bytes(entry)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], read)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_file(folder / file, shard, read)
    total = sum(_bytes(entry) for entry in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _bytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return torch.Size(shape).numel() * dtype.itemsize


def _write_file(path: Path, tensors: Shapes, read: Callable[[str], Tensor]) -> None:
    # The widest dtypes first: every tensor then starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + _bytes(tensors[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                raise ValueError(f"{name} is not what the header of {path.name} says")
            tensor.contiguous().view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
