"""Where weights are read from, tensor by tensor: checkpoints, official directories, JAX files.

Each source has `read(name)`, `shape(name)` and `names`; a checkpoint's names are ours, the other
two's the official ones. Nothing larger than one tensor is held.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ttt.checkpoint.reader import CheckpointReader, check_plain, load_plain
from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import Parameter
from megatron_ttt.stack import EMBEDDING, HEAD

# Constants that some writers store among the weights.
_CONSTANT = re.compile(r"\.(inv_freq|token_idx)$")
_HEAD = "lm_head.weight"

# megatron-core stores these two norms under the names of its fused layers.
_STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class CheckpointTensors:
    """The weights of a checkpoint written at any layout, under our global names.

    megatron-core stacks a parameter's layers to one stored tensor; one layer's slice is read.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        metadata = check_plain(self.path)
        self._reader = CheckpointReader(self.path, metadata)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._rows = checkpoint.config["model"]["vocab_size"]
        tp = (checkpoint.state.get("layout") or {"tensor": 1})["tensor"]
        self._padded_rows = -(-self._rows // tp) * tp

    def read(self, name: str) -> Tensor:
        """The global tensor of a parameter."""
        key, layer = self._locate(name)
        entry = self._stored[key]
        lead = () if layer is None else (1,)
        shape = self.shape(name)
        tensor = torch.empty((*lead, *shape), dtype=entry.properties.dtype)
        offsets = (*(() if layer is None else (layer,)), *(0 for _ in shape))
        chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(_numel(item.lengths) for item in items) != tensor.numel():
            raise UserError(f"{self.path}: {name} is not whole; use another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor))
        except UserError:
            raise
        except Exception as error:  # a cut file fails in the unpickler or in the copy
            raise UserError(f"{self.path} is damaged: cannot read {name} ({error})") from None
        return tensor if layer is None else tensor[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's global shape, without the rows that pad the vocabulary in older
        checkpoints."""
        key, layer = self._locate(name)
        shape = tuple(self._stored[key].size[0 if layer is None else 1 :])
        is_padded = name in (EMBEDDING, HEAD) and shape[0] == self._padded_rows
        return (self._rows, *shape[1:]) if is_padded else shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a parameter is stored in."""
        return self._stored[self._locate(name)[0]].properties.dtype

    def check(self, table: dict[str, Parameter]) -> None:
        """Raise UserError for a parameter that is missing or of another shape."""
        for name, row in table.items():
            if self.shape(name) != row.shape:
                raise UserError(
                    f"{self.path}: {name} is {self.shape(name)}, its configuration asks for "
                    f"{row.shape}"
                )

    def _locate(self, name: str) -> tuple[str, int | None]:
        """The stored tensor's key, and which of its layers it is where layers are stacked."""
        layer, tail = None, name
        if name.startswith("decoder.layers."):
            number, tail = name.removeprefix("decoder.layers.").split(".", 1)
            tail = _STORED.get(tail, tail)
            layer, name = int(number), f"decoder.layers.{number}.{tail}"
        if name in self._stored:
            return name, None
        key = f"decoder.layers.{tail}"
        if key in self._stored and layer is not None and layer < self._stored[key].size[0]:
            return key, layer
        raise UserError(f"{self.path} lacks {name}, which its configuration asks for")


def _numel(lengths) -> int:
    return torch.Size(lengths).numel()


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def resolve_tensor(self, read_item) -> Tensor:
        target = self.tensor
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(dim, start, size)
        return target

    def commit_tensor(self, read_item, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *_, **__):
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


_DAMAGE = (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError)


class HFTensors:
    """The tensors of an official directory: *.safetensors, else pytorch_model*.bin."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        self._bins: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        try:
            for file in files:
                with safe_open(file, "pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            if not files:
                for file in sorted(folder.glob("pytorch_model*.bin")):
                    mapped = zipfile.is_zipfile(file)  # torch.save's older format is not
                    self._bins |= load_plain(file, mmap=mapped)
        except (*_DAMAGE, TypeError) as error:
            raise UserError(f"{file} is damaged: {_first_line(error)}") from None
        if not self._files and not self._bins:
            raise UserError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")
        index = folder / "model.safetensors.index.json"
        if self._files and index.exists():
            try:
                listed = set(json.loads(index.read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged: {_first_line(error)}") from None
            if missing := sorted(listed - {file.name for file in files}):
                raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")

    @property
    def names(self) -> set[str]:
        """All tensors there are."""
        return self._files.keys() | self._bins.keys()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        if name in self._bins:
            return self._bins[name].clone()
        # Opened anew each time: pages of a file that stays mapped would count as this process's.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""
        if name in self._bins:
            return tuple(self._bins[name].shape)
        with safe_open(self._files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def check_hf_tensors(source, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse official weights unless every tensor of `shapes` is there, of its shape, and no other.

    A head that equals the embedding is tolerated. Raises UserError.
    """
    for name, shape in shapes.items():
        if name not in source.names:
            raise UserError(f"the weights lack {name}, which config.json asks for")
        if source.shape(name) != shape:
            raise UserError(
                f"the weights do not fit config.json: {name} is {source.shape(name)}, not {shape}"
            )
    unknown = sorted(name for name in source.names - set(shapes) if not _CONSTANT.search(name))
    if _HEAD in unknown:
        unknown.remove(_HEAD)
        embedding = next(iter(shapes))  # the first of every table
        if not torch.equal(source.read(_HEAD), source.read(embedding)):
            raise UserError(f"{_HEAD} is not {embedding}; config.json ties them")
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"the weights hold {unknown[0]}{more}, which config.json has no place for")
