"""A checkpoint at any layout: its loss, its logits, its gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ttt.checkpoint.state import load_weights
from megatron_ttt.checkpoint.store import open_checkpoint
from megatron_ttt.config import Config
from megatron_ttt.data.batches import open_data
from megatron_ttt.errors import UserError
from megatron_ttt.hf.mapping import gather_official
from megatron_ttt.model import build_chunks, core_config
from megatron_ttt.training.step import run_batches


class Evaluator:
    """A checkpoint's model, built at the layout of `config`, with its weights loaded.

    dtype: float64 or float32; None for `training.precision`'s.
    """

    def __init__(self, config: Config, platform, checkpoint: str, dtype: torch.dtype | None):
        self.config, self.platform = config, platform
        self.chunks = build_chunks(config, core_config(config, platform, dtype))
        load_weights(open_checkpoint(checkpoint), self.chunks)
        for chunk in self.chunks:
            chunk.eval()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss over `data.validation`; every rank gets it."""
        data = open_data(self.config, train=False)
        batches = data.validation_batches()
        if not batches:
            raise UserError("data.validation is not set: name what to evaluate on")
        device = self.platform.device
        return run_batches(self.chunks, batches, data.masked_id, device, forward_only=True)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor | None:
        """input_ids [B, L] -> logits [B, L, V], on the last pipeline stage; elsewhere None."""
        results = self._run(self.chunks, input_ids, _collect, collect_non_loss_data=True)
        return self._whole(results[0]) if results else None

    def gradients(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Gradients of the mean next-token cross-entropy, all of them, under official names.

        The cross-entropy is taken from the logits, in their dtype. Every rank gets all.
        """
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
        ddp_chunks = [DistributedDataParallel(c.config, options, c) for c in self.chunks]
        self.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        for ddp in ddp_chunks:
            ddp.zero_grad_buffer()
        self._run(ddp_chunks, input_ids, partial(self._cross_entropy, input_ids), backward=True)
        return gather_official(self.chunks, self.config.model, lambda p: p.main_grad)

    def _run(self, chunks: list[nn.Module], input_ids, loss, *, backward=False, **options):
        def forward_step(batches, chunk):
            return chunk(next(batches), None, None), loss

        batch, length = input_ids.shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([input_ids.to(self.platform.device)]) for _ in chunks],
            model=chunks,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            decoder_seq_length=length,
            forward_only=not backward,
            **options,
        )

    def _whole(self, logits: Tensor) -> Tensor:
        """This rank's columns [B, L, V/TP] -> [B, L, V]."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return whole[..., : self.config.model.vocab_size]

    def _cross_entropy(self, input_ids: Tensor, logits: Tensor):
        logits = self._whole(logits)
        targets = input_ids[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        return loss, {"loss": loss.detach().clone()}


def _collect(logits: Tensor, non_loss_data: bool = False) -> Tensor:
    return logits


def read_input_ids(path: Path, vocab_size: int) -> Tensor:
    """Token ids [B, L] from a .npy file. Raises UserError for anything else."""
    try:
        ids = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read token ids from {path}: {error}") from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype}{list(ids.shape)}, not integer ids [B, L]")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(f"{path} holds ids outside the vocabulary of {vocab_size}")
    return torch.from_numpy(ids.astype(np.int64))


def is_last_stage_writer() -> bool:
    """Whether this rank writes what the last stage knows: one of the whole job."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def evaluation_config(checkpoint: str, overrides: list[str]) -> Config:
    """The configuration a checkpoint was trained with, under overrides, at a batch of one.

    Layout, data and device come from the overrides; what an imported checkpoint does not say, from
    the defaults.
    """
    from megatron_ttt.config import config_from_tree

    tree: dict[str, Any] = dict(open_checkpoint(checkpoint).config)
    tree.pop("parallel", None)
    tree.setdefault("optimizer", {"lr": 0.0})
    tree.setdefault("training", {"steps": 1, "precision": "fp32"})
    tree.setdefault("run", {"dir": str(Path(checkpoint).parent)})
    return config_from_tree(tree, overrides)
