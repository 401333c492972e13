"""megatron-core's data parallelism and distributed AdamW around our chunks.

The distributed optimizer is used always, on one process too: it alone can save a model that mixes
bf16 and fp32 parameters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from torch import Tensor, nn

from megatron_ttt.checkpoint.boxes import cut
from megatron_ttt.config import Config
from megatron_ttt.platform.compat import gradients_for_norm
from megatron_ttt.platform.mcore_workarounds.optimizer import (
    create_moments,
    leave_out_step,
    save_own_shards,
    use_fused_adamw,
)

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Per parameter: the main parameter and AdamW's two moments."""
STATE = "optimizer.state"
"""What their names in a checkpoint begin with."""


def wrap_chunks(config: Config, chunks: list[nn.Module]) -> list[DistributedDataParallel]:
    """Put megatron-core's DDP round the chunks and tell their core config how to reduce."""
    overlap = config.parallel.overlap
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        grad_reduce_in_fp32=True,
        bucket_size=config.parallel.bucket_size,
    )
    core = chunks[0].config
    # Not Megatron's disable_bucketing for later chunks: it gathers bf16 and fp32 parameters in one
    # coalesced call, which under gloo gives back other bits than were sent.
    wrapped = [DistributedDataParallel(core, ddp_config, chunk) for chunk in chunks]
    core.finalize_model_grads_func = finalize_model_grads
    if overlap:
        one = len(wrapped) == 1
        core.no_sync_func = wrapped[0].no_sync if one else [d.no_sync for d in wrapped]
        core.grad_sync_func = (
            wrapped[0].start_grad_sync if one else [d.start_grad_sync for d in wrapped]
        )
        core.param_sync_func = (
            wrapped[0].start_param_sync if one else [d.start_param_sync for d in wrapped]
        )
    return wrapped


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]):
    """AdamW over the wrapped chunks; the learning rate is set each step by the trainer."""
    options = config.optimizer
    bf16 = config.training.precision == "bf16"
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
    )
    overrides = {} if options.decay_all else get_standard_config_overrides(optimizer_config)
    # One dtype a parameter group, or saving mixes the shards of bf16 and fp32 parameters up.
    overrides[ParamKey(attr="keep_fp32")] = ParamGroupOverride(fp32=True)
    optimizer = get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides)
    set_options(optimizer, config)
    save_own_shards(optimizer, _parts_of_checkpoint)
    create_moments(optimizer)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _parts_of_checkpoint(
    entry: ShardedTensor | ShardedTensorFactory, owned: range, states: dict[str, Tensor]
) -> dict[str, dict[str, ShardedTensor]]:
    """A checkpoint's entries for one parameter's main parameter and moments, by KINDS."""
    return {kind: cut(entry, owned, states[kind].detach(), f"{STATE}.{kind}.") for kind in KINDS}


def set_options(optimizer, config: Config) -> None:
    """Give every parameter group what the configuration says: megatron-core leaves the decay to its
    own scheduler, which is not used here, and loading brings what held when the checkpoint was
    written."""
    options = config.optimizer
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (options.beta1, options.beta2), options.eps
    use_fused_adamw(optimizer)


@torch.no_grad()
def step_optimizer(optimizer, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Clip and step on the reduced gradients; return their norm and whether that was left out.

    It is left out where loss (a scalar on the device) or norm is not finite: weights and moments
    then stay as they are, bit for bit. Both results are scalars on the device, the norm in float64,
    the other 1.0 or 0.0 in float32. The host launches a step that is left out like any other, and
    waits for nothing: torch's fused AdamW looks at `found_inf` on the device. Transformer Engine's
    and Apex's Adam do not, so that with one of them the host reads the flag before they step.
    """
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer)
    skipped = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    if HAVE_APEX_OR_TE and skipped.item():
        return norm, skipped
    for inner in optimizer.chained_optimizers:
        _clip(inner, norm, skipped)
    leave_out_step(optimizer, skipped)
    optimizer.step_with_ready_grads()
    return norm, skipped


def gradient_norm(optimizer) -> Tensor:
    """The 2-norm of the gradients of all ranks, as megatron-core's `get_grad_norm` counts it.

    A float64 scalar on the device; that one reads a number a tensor. To be called on all ranks.
    """
    gradients = [g for inner in optimizer.chained_optimizers for g in gradients_for_norm(inner)]
    if gradients:
        square = torch.stack(torch._foreach_norm(gradients)).norm() ** 2
    else:
        square = torch.zeros((), device=optimizer.get_loss_scale().device)
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.double().sqrt()


def _clip(inner: DistributedOptimizer, norm: Tensor, skipped: Tensor) -> None:
    """Scale the gradients of one optimizer down to its `clip_grad`, by a factor on the device.

    That is 1 where nothing is clipped, and where the step is left out: the gradients then tell
    where the first bad number is.
    """
    limit = inner.config.clip_grad
    gradients = [p.grad for p in inner.get_parameters() if p.grad is not None]
    if gradients and limit > 0:
        factor = (limit / (norm + 1e-6)).clamp_max(1.0).float()
        torch._foreach_mul_(gradients, torch.where(skipped > 0, 1.0, factor))


def set_learning_rate(optimizer, learning_rate: float) -> None:
    """Give every parameter group this step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Make the weights current: with overlapped gathering they are stale after a step until the
    next forward. Call before anything but training reads them. Alone in its data-parallel group, a
    rank has them all: gathering would copy each onto itself."""
    alone = parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather and not alone:
            chunk.disable_forward_pre_hook()
            chunk.enable_forward_pre_hook()
