"""A checkpoint of any layout in, a Hugging Face directory out: weights, code, tokenizer, card.

Needs neither the layout that wrote the checkpoint nor a GPU. Weights are copied tensor by tensor
and verified layer by layer, so memory is that of the embedding and a layer, not of the model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttt.checkpoint.run_folder import Checkpoint, open_whole_checkpoint
from megatron_ttt.config import Config, config_with_defaults
from megatron_ttt.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_ttt.errors import UserError, make_folder
from megatron_ttt.hf.code import codes_of, configuration_of, write_code
from megatron_ttt.hf.configuration import hf_config_of, is_llama
from megatron_ttt.hf.export_manifest import write_source
from megatron_ttt.hf.mapping import split
from megatron_ttt.hf.model_card import model_card
from megatron_ttt.hf.safetensors_stream import write_safetensors
from megatron_ttt.hf.tensors import CheckpointTensors, HFTensors
from megatron_ttt.hf.tokenizer_check import check_trained_with
from megatron_ttt.hf.tokenizer_files import write_tokenizer
from megatron_ttt.hf.verification import verify, verify_configuration
from megatron_ttt.stack import Architecture, architecture_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_OPTION = "--tokenizer-model FILE"


def export_checkpoint(
    path: Path,
    output: Path,
    *,
    tokenizer_model: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint as the Hugging Face directory `output`, verified before it has its name.

    tokenizer_model: a SentencePiece model or a tokenizer.json; None takes data.tokenizer_model of
    the checkpoint, where that file still is. dtype: of all weights; None keeps each tensor's.
    Raises UserError, and leaves nothing behind, where the checkpoint is damaged, that file is not
    what it was, something does not fit or the two models differ.
    """
    if output.exists():
        raise UserError(f"{output} exists: name a new folder")
    checkpoint = open_whole_checkpoint(path)
    config = config_with_defaults(checkpoint.config, path)
    tensors = CheckpointTensors(checkpoint)
    architecture = architecture_of(config)
    tensors.check(architecture.parameters())
    tokenizer = _tokenizer(checkpoint, config, tokenizer_model)
    temporary = output.parent / f".unverified-{output.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        _write_weights(tensors, architecture, temporary, dtype, shard_bytes)
        _write_configuration(checkpoint, config, tensors, tokenizer, dtype, temporary)
        if tokenizer is not None:
            write_tokenizer(tokenizer.model_path, temporary, config.training.seq_length)
        write_source(temporary, checkpoint)
        verify_configuration(architecture, temporary)
        verify(architecture, tensors.read, HFTensors(temporary).read, _cast(dtype))
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(checkpoint: Checkpoint, config: Config, named: Path | None) -> Tokenizer | None:
    recorded = config.data.tokenizer_model
    if named is None and recorded is None:
        return None
    if named is None and not Path(recorded).exists():
        print(
            f"Warning: {recorded} is gone: the export has no tokenizer, give it with "
            f"{TOKENIZER_OPTION}",
            file=sys.stderr,
            flush=True,
        )
        return None
    tokenizer = load_tokenizer(named or recorded)
    path = tokenizer.model_path
    check_trained_with(checkpoint, path, TOKENIZER_OPTION, named=named is not None)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer


def _cast(dtype: str | None):
    return None if dtype is None else lambda tensor: tensor.to(DTYPES[dtype])


def _write_weights(
    tensors: CheckpointTensors,
    architecture: Architecture,
    folder: Path,
    dtype: str | None,
    shard_bytes: int,
) -> None:
    source, plan = {}, {}
    for row in architecture.parameters().values():
        wanted = DTYPES[dtype] if dtype else tensors.dtype(row.name)
        for part, shape in row.hf_shapes().items():
            source[part] = row
            plan[part] = (wanted, shape)
    held: dict[str, Tensor] = {}

    def read(part: str) -> Tensor:
        """One official tensor; its siblings in a packed projection come next, and are held."""
        if part not in held:
            held.clear()
            held.update(split(source[part], tensors.read(source[part].name)))
        return held.pop(part).to(plan[part][0])

    write_safetensors(folder, plan, read, shard_bytes)


def _write_configuration(
    checkpoint: Checkpoint,
    config: Config,
    tensors: CheckpointTensors,
    tokenizer: Tokenizer | None,
    dtype: str | None,
    folder: Path,
) -> None:
    """config.json, generation_config.json, the code and the model card."""
    architecture, official = architecture_of(config), checkpoint.state.get("official", {})
    # An imported config.json that leaves out EOS stands for transformers' default.
    eos = 2 if "official" in checkpoint.state else None
    ids = {"bos_token_id": config.data.bos_id, "eos_token_id": eos, "pad_token_id": None}
    ids |= {key: official[key] for key in ids if key in official}
    if tokenizer is not None:
        known = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        ids = {f"{role}_token_id": id if id >= 0 else None for role, id in known.items()}
    in_config = dict(ids)
    if ids["pad_token_id"] is None:
        # Batches are padded with it and it is masked out. A LlamaModel would also keep the row of
        # its config's pad id from being trained, which this one is.
        eos = ids["eos_token_id"]
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        in_config["pad_token_id"] = None if is_llama(architecture) else ids["pad_token_id"]
    projection = next(name for name in architecture.parameters() if "linear_fc1" in name)
    stored = DTYPES[dtype] if dtype else tensors.dtype(projection)
    trained = config.training.seq_length if "training" in checkpoint.config else 2048
    tree = {
        **hf_config_of(architecture),
        "max_position_embeddings": official.get("max_position_embeddings", trained),
        **in_config,
        "torch_dtype": str(stored).removeprefix("torch."),
    }
    _write_json(folder / "config.json", tree)
    _write_json(folder / "generation_config.json", ids)
    if not is_llama(architecture):
        write_code(folder, codes_of(architecture), configuration_of(architecture))
    (folder / "README.md").write_text(model_card(checkpoint, config, tokenizer is not None))


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")
