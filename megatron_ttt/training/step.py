"""One pass over a global batch through megatron-core's schedules, and its loss.

Nothing here waits for the device: the loss is left on it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn


def sequence_mean_loss(
    token_losses: Tensor, labels: Tensor, ignored_target_id: int | None
) -> Tensor:
    """The recipe's loss: mean over each sequence's targets, then over sequences.

    token_losses, labels [B, S] -> scalar. Targets equal to ignored_target_id (BOS) do not count; a
    sequence of nothing else counts as zero.
    """
    if ignored_target_id is None:
        return token_losses.mean()
    kept = (labels != ignored_target_id).to(token_losses.dtype)
    return ((token_losses * kept).sum(1) / kept.sum(1).clamp_min(1.0)).mean()


def _loss(labels: Tensor, ignored_target_id: int | None, token_losses: Tensor):
    loss = sequence_mean_loss(token_losses, labels, ignored_target_id)
    # Cloned: the schedule divides the loss by the number of microbatches in place.
    return loss, {"loss": loss.detach().clone()}


def _forward_step(ignored_target_id: int | None, device: torch.device, batches, chunk: nn.Module):
    tokens = next(batches).to(device, non_blocking=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    return chunk(inputs, None, None, labels=labels), partial(_loss, labels, ignored_target_id)


def run_batches(
    chunks: list[nn.Module],
    microbatches: list[Tensor],
    ignored_target_id: int | None,
    device: torch.device,
    *,
    forward_only: bool = False,
) -> Tensor:
    """Run this rank's microbatches ([mbs, L+1] token ids each); return the global batch's loss.

    The loss, a float32 scalar on the device, is the same on every rank: the mean over microbatches
    and data-parallel ranks. Unless forward_only, gradients are left reduced in the DDP buffers.
    """
    size, length = microbatches[0].shape
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, ignored_target_id, device),
        data_iterator=[iter(microbatches) for _ in chunks],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=length - 1,
        micro_batch_size=size,
        decoder_seq_length=length - 1,
        forward_only=forward_only,
    )
    loss = torch.zeros((), device=device)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        # In float64: each tensor-parallel rank has a data-parallel group of its own, which may add
        # in another order, and all ranks decide by this number.
        mean = torch.stack([result["loss"] for result in results]).double().mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        loss = (mean / parallel_state.get_data_parallel_world_size()).float()
    dist.broadcast(
        loss,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return loss
