"""transformers' model with the weights of a checkpoint or of a directory, checked on the way in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.hf.building import build_empty_hf_model, tie_head
from megatron_ttt.hf.configuration import architecture_from_hf_config, read_hf_config
from megatron_ttt.hf.mapping import hf_shapes, split
from megatron_ttt.hf.tensors import CheckpointTensors, HFTensors, check_hf_tensors
from megatron_ttt.stack import Architecture


def load_directory(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of an official directory, in evaluation mode on the CPU.

    Its code is ours, not what the directory may hold. dtype: None keeps each tensor's. Raises
    UserError for weights that do not fit config.json.
    """
    architecture = architecture_from_hf_config(read_hf_config(folder / "config.json"))
    tensors = HFTensors(folder)
    shapes = hf_shapes(architecture)
    check_hf_tensors(tensors, shapes)
    return _filled(architecture, {name: _cast(tensors.read(name), dtype) for name in shapes})


def load_checkpoint(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a checkpoint written at any layout; as `load_directory`."""
    tensors = CheckpointTensors(checkpoint)
    table = architecture.parameters()
    tensors.check(table)
    weights = {
        part: _cast(tensor, dtype).contiguous()
        for row in table.values()
        for part, tensor in split(row, tensors.read(row.name))
    }
    return _filled(architecture, weights)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _filled(architecture: Architecture, weights: dict[str, torch.Tensor]) -> nn.Module:
    network = build_empty_hf_model(architecture)
    network.load_state_dict(weights, strict=False, assign=True)
    tie_head(network, architecture)
    return network
