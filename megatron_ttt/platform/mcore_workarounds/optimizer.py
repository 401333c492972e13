"""Workarounds in megatron-core's distributed optimizer and in the AdamW inside it.

`optimizer` is what `get_megatron_optimizer` returns, a ChainedOptimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from torch import Tensor, nn

Describe = Callable[[Any, range, dict[str, Tensor]], dict[str, Any]]
"""(a parameter's entry in the model's sharded state dict, this rank's flat range of the parameter,
its main parameter and moments there) -> the entries that a checkpoint has for them."""


def save_own_shards(optimizer, describe: Describe) -> None:
    """Let each rank save and load the part of the optimizer's state that it owns, and no more.

    Seen in: 0.16.1, 0.19.2
    Symptom: the only format that can be read at another layout, `fully_reshardable`, gathers the
        state of all data-parallel ranks on each of them, three float32 copies of the model, and
        loading allocates as much.
    Done: each DistributedOptimizer becomes a ShardSavingOptimizer, which stores and loads what
        `describe` returns; without Transformer Engine and Apex, a TorchAdamDistributedOptimizer.
    """
    for inner in optimizer.chained_optimizers:
        inner.__class__ = ShardSavingOptimizer if HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer
        inner.describe = describe


class ShardSavingOptimizer(DistributedOptimizer):
    """DistributedOptimizer after `save_own_shards`."""

    describe: Describe

    def owned_ranges(self) -> dict[nn.Parameter, range]:
        """Return the flat range of each parameter that this rank owns; empty where it owns none."""
        owned = {p: range(0) for buffer in self.buffers for p in buffer.param_index_map}
        for parameter in self.model_param_gbuf_map:
            spans = self._get_model_param_range_map(parameter)["param"]
            owned[parameter] = range(spans.start, spans.end)
        return owned

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict, is_loading=False, metadata=None
    ):
        """Return this rank's main parameters and moments as parts of global tensors. They are views
        of the state, which loading reads into."""
        entries, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        of_parameter = {entry.data: entry for entry in nested_values(entries)}
        return {
            number: self.describe(
                of_parameter[parameter], owned, self._get_main_param_and_optimizer_states(parameter)
            )
            for number, (parameter, owned) in enumerate(self.owned_ranges().items())
            if owned
        }

    def load_parameter_state_from_fully_reshardable(self, state_dict):
        """Do nothing: the state was read into."""


class TorchAdamDistributedOptimizer(ShardSavingOptimizer):
    """DistributedOptimizer after `save_own_shards`, around torch's AdamW.

    Seen in: 0.16.1, 0.19.2
    Symptom: `load_state_dict` gives all parameters one `step` tensor. Each parameter's update adds
        one to it, so that a step after a resume counts as many steps as there are parameters.
    Done: each parameter gets a copy of its own.
    """

    def load_state_dict(self, state_dict):
        """Load, then part the `step` tensors."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def create_moments(optimizer) -> None:
    """Create the moments of torch's AdamW before its first step.

    Seen in: 0.16.1, 0.19.2
    Symptom: saving and loading need the moments, and `state_dict()` fails on an AssertionError
        while there are none. megatron-core's own way to create them is a step on zero gradients,
        which decays the weights.
    Done: the state of every parameter is set, as AdamW does it in its first step. Transformer
        Engine's and Apex's Adam are left alone.
    """
    if HAVE_APEX_OR_TE:
        return
    for inner in optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                inner.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def use_fused_adamw(optimizer) -> None:
    """Let torch's AdamW run its fused kernel; call it again after loading.

    Seen in: 0.16.1, 0.19.2
    Symptom: megatron-core constructs AdamW without `fused`, and has no option for it. The other
        kernels are slower and refuse the flag of `leave_out_step`.
    Done: `fused` is set in every parameter group. Transformer Engine's and Apex's Adam are left
        alone.
    """
    if not HAVE_APEX_OR_TE:
        for group in optimizer.param_groups:
            group["fused"] = True


def leave_out_step(optimizer, skipped: Tensor) -> None:
    """Let the next step change nothing where `skipped`, a float32 scalar on the device, is 1.

    Seen in: 0.16.1, 0.19.2
    Symptom: megatron-core looks for gradients that are not finite only under a loss scaler, which
        bf16 and fp32 do not have: one such gradient makes weights and moments NaN. Where it does
        look, the host waits for the device.
    Done: the flag is set as `found_inf`, which torch's GradScaler uses and fused AdamW reads on the
        device. Transformer Engine's and Apex's Adam ignore it.
    """
    for inner in optimizer.chained_optimizers:
        inner.optimizer.found_inf = skipped
