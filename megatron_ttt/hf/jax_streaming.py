"""The official JAX trainer's streaming checkpoints (EasyLM): msgpack pairs of key path and tensor.

A tensor is what flax serialises: msgpack's extension type 1 around (shape, dtype, bytes). Files
with optimizer state have their parameters under params/params; files of bare parameters have not.
Needs no JAX. Layout of the names: docs/huggingface.md.
"""

from __future__ import annotations

from pathlib import Path

import msgpack
import torch
from torch import Tensor

from megatron_ttt.errors import UserError

_NDARRAY = 1
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_TOP = {
    "wte.embedding": "model.embed_tokens.weight",
    "ln_f.kernel": "model.norm.weight",
}
_LAYER = {
    "conv.conv_norm.kernel": "conv.norm.weight",
    "conv.conv1.kernel": "conv.conv.weight",
    "conv.conv1.bias": "conv.conv.bias",
    "seq_norm.kernel": "seq_norm.weight",
    "ffn_norm.kernel": "ffn_norm.weight",
    "feed_forward.w1.kernel": "mlp.gate_proj.weight",
    "feed_forward.w3.kernel": "mlp.up_proj.weight",
    "feed_forward.w2.kernel": "mlp.down_proj.weight",
}
_MIXER = {
    "learnable_token_idx": "learnable_token_idx",
    "learnable_ttt_lr/kernel": "learnable_ttt_lr_weight",
    "learnable_ttt_lr/bias": "learnable_ttt_lr_bias",
    "ttt_norm/scale": "ttt_norm_weight",
    "ttt_norm/bias": "ttt_norm_bias",
    "ttt_dense_0": "W1",
    "ttt_bias_0": "b1",
    "ttt_dense_1": "W2",
    "ttt_bias_1": "b2",
    "post_norm.scale": "post_norm.weight",
    "post_norm.bias": "post_norm.bias",
    **{f"w{part}.kernel": f"{part}_proj.weight" for part in "qkvgo"},
    **{f"conv_{part}.kernel": f"conv_{part}.weight" for part in "qk"},
    **{f"conv_{part}.bias": f"conv_{part}.bias" for part in "qk"},
}
_LAYER |= {f"seq_modeling_block.{k}": f"seq_modeling_block.{v}" for k, v in _MIXER.items()}


class JaxTensors:
    """The parameters of a streaming checkpoint, under official names, read tensor by tensor."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            with open(path, "rb") as file:
                unpacker = _unpacker(file)
                while True:
                    offset = unpacker.tell()
                    try:
                        key, value = unpacker.unpack()
                    except msgpack.OutOfData:
                        break
                    if name := official_name(key):
                        self._offsets[name] = offset
                        self._shapes[name] = tuple(_tensor(name, value).shape)
                end = file.seek(0, 2)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise UserError(f"{path} is no streaming checkpoint: {error}") from None
        if offset != end:
            raise UserError(f"{path} is cut short: it ends inside a tensor; fetch it again")
        if not self._offsets:
            raise UserError(f"{path} holds no parameters of a TTT model")

    @property
    def names(self) -> set[str]:
        """The parameters there are."""
        return set(self._offsets)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with open(self.path, "rb") as file:
            file.seek(self._offsets[name])
            return _tensor(name, _unpacker(file).unpack()[1]).clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's official shape."""
        return self._shapes[name]


def _unpacker(file) -> msgpack.Unpacker:
    return msgpack.Unpacker(file, max_buffer_size=0, read_size=1 << 20)


def official_name(key: list[str]) -> str | None:
    """The official name of a key path; None for what is no parameter (step, optimizer state).

    Raises ValueError for a parameter that the official format does not have.
    """
    path = list(key)
    while path[:1] == ["params"]:
        path = path[1:]
    if path[:1] != ["model"]:
        return "lm_head.weight" if path == ["lm_head", "kernel"] else None
    if path[1] != "h":
        name = _TOP.get(".".join(path[1:]))
    else:
        name = _LAYER.get(".".join(path[3:]))
        name = name and f"model.layers.{int(path[2])}.{name}"
    if name is None:
        raise ValueError(f"unknown parameter {'/'.join(key)}")
    return name


def _tensor(name: str, value: bytes) -> Tensor:
    """A serialised tensor in the official layout: linears [out, in], convolutions [D, 1, width].

    Raises ValueError where it is none.
    """
    extension = msgpack.unpackb(value, strict_map_key=False)
    if not isinstance(extension, msgpack.ExtType) or extension.code != _NDARRAY:
        raise ValueError(f"{name} is no array")
    shape, dtype, data = msgpack.unpackb(extension.data)
    dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is of dtype {dtype}")
    tensor = torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape)
    if name.endswith(("_proj.weight", "lm_head.weight")):
        return tensor.t().contiguous()
    if name.endswith(("conv.conv.weight", "conv_q.weight", "conv_k.weight")):
        return tensor.permute(2, 1, 0).contiguous()
    if name.endswith("learnable_ttt_lr_weight"):
        return tensor.transpose(1, 2).contiguous()
    return tensor
