"""An official directory, or a JAX checkpoint, in; a checkpoint that any layout can load out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ttt.checkpoint.run_folder import open_checkpoint
from megatron_ttt.errors import UserError
from megatron_ttt.hf.building import build_on_cpu
from megatron_ttt.hf.configuration import architecture_from_hf_config, read_hf_config
from megatron_ttt.hf.mapping import hf_shapes, join
from megatron_ttt.hf.tensors import CheckpointTensors, HFTensors, check_hf_tensors
from megatron_ttt.hf.verification import verify
from megatron_ttt.model import global_parameters

if TYPE_CHECKING:
    from megatron_ttt.hf.jax_streaming import JaxTensors


def import_directory(source: Path, output: Path) -> None:
    """Read config.json and *.safetensors (or pytorch_model*.bin) of `source`.

    Writes the checkpoint folder `output`; runs on the CPU. Every tensor keeps its dtype. Raises
    UserError, and writes nothing, where the weights do not fit or the models differ.
    """
    official = read_hf_config(source / "config.json")
    import_tensors(HFTensors(source), official, output)


def import_jax(source: Path, config: Path, output: Path) -> None:
    """Read the official JAX trainer's streaming checkpoint; `config` is an official config.json."""
    from megatron_ttt.hf.jax_streaming import JaxTensors

    official = read_hf_config(config)
    import_tensors(JaxTensors(source), official, output)


def import_tensors(source: HFTensors | JaxTensors, official: dict[str, Any], output: Path) -> None:
    """Write official tensors as a checkpoint of weights alone, verified before it has its name."""
    if output.exists():
        raise UserError(f"{output} exists: name a new folder")
    architecture = architecture_from_hf_config(official)
    check_hf_tensors(source, hf_shapes(architecture))

    from megatron_ttt.checkpoint.writer import save_checkpoint

    chunk = build_on_cpu(architecture, torch.float32)
    table = architecture.parameters()
    for name, parameter in global_parameters(chunk):
        parameter.data = join(table[name], source.read)
    state = {"step": 0, "config": architecture.to_tree(), "official": official}
    unverified = output.parent / f".unverified-{output.name}"
    try:
        save_checkpoint(unverified, [chunk], None, state)
        del chunk, parameter
        written = CheckpointTensors(open_checkpoint(unverified))
        verify(architecture, written.read, source.read)
        os.rename(unverified, output)
    finally:
        for folder in (unverified, *output.parent.glob(f".incomplete-{unverified.name}.*")):
            shutil.rmtree(folder, ignore_errors=True)
