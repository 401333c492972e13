"""An official-format directory in, a checkpoint that any layout can load out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt import platform as platforms
from megatron_ttt.config import Config, ModelConfig, TrainingConfig, to_dict
from megatron_ttt.errors import UserError
from megatron_ttt.hf.configuration import model_from_official


def import_directory(source: Path, output: Path) -> None:
    """Read config.json and *.safetensors of `source`; write the checkpoint folder `output`.

    Runs on the CPU. Weights are stored in float32, or float64 where they are that.
    """
    if output.exists():
        raise UserError(f"{output} exists: name a new folder")
    try:
        official = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {source / 'config.json'}: {error}") from None
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source} holds no .safetensors file")
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    write_checkpoint(model_from_official(official), tensors, output)


def write_checkpoint(model: ModelConfig, official: dict[str, Tensor], output: Path) -> None:
    """Write official global tensors as a checkpoint of weights alone."""
    stored = {tensor.dtype for tensor in official.values()}
    dtype = torch.float64 if torch.float64 in stored else torch.float32
    config = Config(model=model, training=TrainingConfig(steps=1, precision="fp32"))
    platform = platforms.start("cpu")
    platforms.start_process_group(platform)
    from megatron.core import parallel_state

    from megatron_ttt.checkpoint.writer import save_checkpoint
    from megatron_ttt.hf.mapping import load_official
    from megatron_ttt.model import build_chunk, core_config

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        platforms.seed_everything(0)
    chunk = build_chunk(config, core_config(config, platform, dtype), None)
    try:
        load_official(chunk, model, official)
    except KeyError as missing:
        raise UserError(f"the weights lack {missing}, which config.json asks for") from None
    except ValueError as error:
        raise UserError(f"the weights do not fit config.json: {error}") from None
    state: dict[str, Any] = {"step": 0, "config": {"model": to_dict(config)["model"]}}
    save_checkpoint(output, [chunk], None, state)
