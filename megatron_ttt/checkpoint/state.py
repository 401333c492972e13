"""What is in a checkpoint, through megatron-core's dist_checkpointing, at any layout.

Weights and optimizer state carry global names and shapes, and are cut anew by whoever reads them.
Random states belong to a rank, and come back only where the layout is the one that wrote them;
those of the device only where it is of the same kind.
"""

from __future__ import annotations

import random
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_ttt.checkpoint.boxes import cut
from megatron_ttt.checkpoint.reader import load_tree
from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.config import Config
from megatron_ttt.errors import UserError
from megatron_ttt.platform.compat import mcore_version, reads_checkpoints_of
from megatron_ttt.platform.mcore_workarounds.saving import with_own_storage
from megatron_ttt.stack import EMBEDDING, HEAD

_UNKNOWN_FORMAT = (
    *(CheckpointingException, UnpicklingError, EOFError),
    *(AttributeError, ImportError, LookupError, TypeError, ValueError),
)
"""What megatron-core, torch and pickle raise where a file is not of the form they know."""


def written_by() -> dict[str, str]:
    """Return the versions that state.json records."""
    return {"megatron_core": mcore_version(), "torch": torch.__version__}


def check_versions(checkpoint: Checkpoint) -> None:
    """Raise UserError for a checkpoint of a megatron-core whose format this one does not know."""
    written = checkpoint.state.get("megatron_core")
    if written is not None and not reads_checkpoints_of(written):
        raise UserError(
            f"{checkpoint.path} was written by megatron-core {written}, which {mcore_version()} "
            "cannot read: install that version or a later one"
        )


def layout(config: Config) -> dict[str, Any]:
    """The layout in force, as state.json records it."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "data": parallel_state.get_data_parallel_world_size(),
    }


def checkpoint_tree(chunks: list[nn.Module], optimizer) -> dict[str, Any]:
    """What this rank writes of a checkpoint of unwrapped chunks; without an optimizer (None) of
    their weights alone. The tensors are views of what they are saved from."""
    tree = _model_tree(chunks)
    if optimizer is not None:
        tree["optimizer"] = optimizer.sharded_state_dict(dict(tree), metadata=_metadata(chunks))
        tree["rng"] = _rng_object()
        _cut_weights(tree, optimizer)
    apply_factories(tree)
    for entry in nested_values(tree):
        if not isinstance(entry, ShardedTensor):
            continue
        if entry.key.endswith((EMBEDDING, HEAD)):
            _leave_out_padding(entry, chunks[0].real_vocab_size)
        if entry.data.device.type == "cpu":
            entry.data = with_own_storage(entry.data)
    return tree


def _cut_weights(tree: dict[str, Any], optimizer) -> None:
    """Leave this rank the part of each weight whose optimizer state it owns: what data-parallel
    ranks hold alike, they write in equal shares."""
    owned = {}
    for inner in optimizer.chained_optimizers:
        owned |= inner.owned_ranges()
    for part in [part for name, part in tree.items() if name.startswith("model")]:
        weights = {n: entry for n, entry in part.items() if isinstance(entry.data, nn.Parameter)}
        for name, entry in weights.items():
            span = owned[entry.data]
            if span:
                values = entry.data.detach().view(-1)[span.start : span.stop]
                part[name] = cut(entry, span, values)
            else:
                del part[name]


def _leave_out_padding(entry: ShardedTensor, rows: int) -> None:
    """Cut the embedding, or a tensor of its optimizer state, to the vocabulary's rows."""
    if entry.global_shape[0] == rows:
        return
    own = max(0, min(rows - entry.global_offset[0], entry.local_shape[0]))
    entry.data = entry.data[:own]
    entry.local_shape = tuple(entry.data.shape)
    entry.global_shape = (rows, *entry.global_shape[1:])
    entry.axis_fragmentations = None  # the ranks' parts are not of one size
    if own == 0:
        entry.replica_id = 1  # a copy of nothing, which is not written


def load_weights(checkpoint: Checkpoint, chunks: list[nn.Module]) -> None:
    """Load the weights alone into unwrapped chunks; collective."""
    _load(_model_tree(chunks), checkpoint)
    _zero_padding(chunks)


def load_checkpoint(
    checkpoint: Checkpoint, config: Config, chunks: list[nn.Module], optimizer
) -> None:
    """Load weights, optimizer and (at the layout that wrote them) random states; collective."""
    tree = _model_tree(chunks)
    tree["optimizer"] = optimizer.sharded_state_dict(
        dict(tree), is_loading=True, metadata=_metadata(chunks)
    )
    same_layout = checkpoint.state["layout"] == layout(config)
    if same_layout:
        tree["rng"] = _rng_object()
    tree = _load(tree, checkpoint)
    _zero_padding(chunks)
    optimizer.load_state_dict(tree["optimizer"])
    if same_layout:
        _set_rng(tree["rng"])


def _load(tree: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what the tree's tensors describe into them; returns what else the checkpoint has.

    Raises UserError where its format is not known here.
    """
    apply_factories(tree)  # else megatron-core reads their parts into memory of its own
    check_versions(checkpoint)
    try:
        return load_tree(checkpoint.path, tree)
    except _UNKNOWN_FORMAT as error:
        reason = error
    except CheckpointException as error:
        reason, _ = error.failures[min(error.failures)]
        if isinstance(reason, OSError):
            raise reason from None  # of the disk, which may be better the next time
    versions = ", ".join(
        f"{name.replace('_', '-')} {checkpoint.state.get(name, 'of a version not recorded')} there "
        f"and {here} here"
        for name, here in written_by().items()
    )
    what = str(reason).strip().splitlines() or [type(reason).__name__]
    raise UserError(
        f"{checkpoint.path} cannot be read ({what[0]}); {versions}: install the versions that "
        "wrote it, or later ones"
    )


def _metadata(chunks: list[nn.Module]) -> dict[str, Any]:
    return {
        # The layers of a hybrid have tensors of their own; those of one kind are stacked.
        "non_homogeneous_layers": chunks[0].is_hybrid,
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_tree(chunks: list[nn.Module]) -> dict[str, Any]:
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=_metadata(chunks))
        for index, chunk in enumerate(chunks)
    }


@torch.no_grad()
def _zero_padding(chunks: list[nn.Module]) -> None:
    """Zero the embedding's rows past the vocabulary: a checkpoint does not hold them, but for older
    ones."""
    first = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name in (EMBEDDING, HEAD):
                parameter[max(0, chunk.real_vocab_size - first * len(parameter)) :] = 0


def _rng_object() -> ShardedObject:
    """This rank's random states."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    return ShardedObject("rng", state, sizes, ranks, replica_id=0)


def _set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    # Those of the device: a GPU's and the CPU's are of other sizes, and stay with their kind.
    if state["cuda"].numel() == torch.cuda.get_rng_state().numel():
        torch.cuda.set_rng_state(state["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
