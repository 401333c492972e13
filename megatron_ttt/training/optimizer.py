"""megatron-core's data parallelism and distributed AdamW around our chunks.

The distributed optimizer is used always, on one process too: it alone can save a model that mixes
bf16 and fp32 parameters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
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


class ShardSavingOptimizer(DistributedOptimizer):
    """DistributedOptimizer of which each rank saves and loads what it owns, and no more.

    super() gathers the state of all data-parallel ranks on each of them.
    """

    def owned_ranges(self) -> dict[nn.Parameter, range]:
        """The flat range of each parameter that this rank owns; empty where it owns none."""
        owned = {p: range(0) for buffer in self.buffers for p in buffer.param_index_map}
        for parameter in self.model_param_gbuf_map:
            spans = self._get_model_param_range_map(parameter)["param"]
            owned[parameter] = range(spans.start, spans.end)
        return owned

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict, is_loading=False, metadata=None
    ):
        """This rank's main parameters and moments as parts of global tensors; views of the state,
        which loading reads into."""
        entries, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        of_parameter = {entry.data: entry for entry in nested_values(entries)}
        return {
            number: {
                kind: cut(of_parameter[parameter], owned, states[kind].detach(), f"{STATE}.{kind}.")
                for kind in KINDS
            }
            for number, (parameter, owned) in enumerate(self.owned_ranges().items())
            if owned
            for states in [self._get_main_param_and_optimizer_states(parameter)]
        }

    def load_parameter_state_from_fully_reshardable(self, state_dict):
        """Nothing is left to do: the state was read into."""


class TorchAdamDistributedOptimizer(ShardSavingOptimizer):
    """As it must be when it holds torch.optim.AdamW (no TE, no Apex)."""

    def create_state(self) -> None:
        """Make the moments now. AdamW would at its first step, but saving and loading need them;
        megatron-core's own remedy is a step on zero gradients, which decays the weights."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def load_state_dict(self, state_dict):
        """super() gives every parameter the same `step` tensor, which then counts each of them."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


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
    for inner in optimizer.chained_optimizers:
        inner.__class__ = ShardSavingOptimizer if HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer
        if not HAVE_APEX_OR_TE:
            inner.create_state()
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_options(optimizer, config: Config) -> None:
    """Give every parameter group what the configuration says: megatron-core leaves the decay to its
    own scheduler, which is not used here, and loading brings what held when the checkpoint was
    written."""
    options = config.optimizer
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (options.beta1, options.beta2), options.eps
        if not HAVE_APEX_OR_TE:
            group["fused"] = True


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
        inner.optimizer.found_inf = skipped
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
