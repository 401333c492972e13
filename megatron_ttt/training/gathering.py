"""The optimizer's state, cut over data-parallel ranks, gathered for a checkpoint."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Per parameter: the main parameter and AdamW's two moments."""


class GatheringOptimizer(DistributedOptimizer):
    """DistributedOptimizer that makes the memory for a checkpoint before it communicates.

    super() does both by turns, so that a rank that runs out of memory leaves the others waiting.
    Call `reserve`, when no rank has failed `gather`, `sharded_state_dict`, in any case `release`.
    """

    gathered: dict | None = None
    """What `get_parameter_state_dp_zero` returns."""

    @property
    def is_cut(self) -> bool:
        """Whether the state is gathered for a checkpoint."""
        return True

    def reserve(self) -> None:
        """Make the memory that `gather` takes: for the whole state on the host, and for a bucket on
        the device. Not collective."""
        if not self.is_cut:
            return
        self.gathered = {"buckets_coalesced": True}
        for number, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges)):
            (dtype,) = ranges
            whole = {kind: torch.zeros(buffer.numel, dtype=torch.float32) for kind in KINDS}
            self.gathered[number] = {dtype: {**whole, "numel_unpadded": buffer.numel}}
        buckets = [bucket.grad_data for buffer in self.buffers for bucket in buffer.buckets]
        largest = max(buckets, key=len)
        self.received = torch.zeros_like(largest, dtype=torch.float32)
        self.sent = self.received[: len(largest) // self.data_parallel_group.size()].clone()

    @torch.no_grad()
    def gather(self) -> None:
        """Gather the state of all data-parallel ranks on each of them. Collective."""
        if not self.is_cut:
            return
        group = self.data_parallel_group
        for number, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges)):
            ((dtype, parts),) = ranges.items()
            start = 0
            for bucket, part in zip(buffer.buckets, parts):
                size = bucket.grad_data.numel()
                sent, received = self.sent[: size // group.size()], self.received[:size]
                for kind in KINDS:
                    sent.zero_()
                    for parameter, spans in part["param_map"].items():
                        span = spans["gbuf_local"]
                        state = self._get_main_param_and_optimizer_states(parameter)
                        sent[span.start : span.end].copy_(state[kind])
                    dist.all_gather(list(received.chunk(group.size())), sent, group=group)
                    self.gathered[number][dtype][kind][start : start + size].copy_(received)
                start += size

    def release(self) -> None:
        """Let go of what was made for a checkpoint; the checkpoint has what it holds of it."""
        self.gathered = self.sent = self.received = None

    def get_parameter_state_dp_zero(self, use_gloo_comm=True, empty_data=False, **options):
        """What `gather` has gathered; for loading, the empty tensors that super() makes."""
        if empty_data:
            return super().get_parameter_state_dp_zero(use_gloo_comm, empty_data, **options)
        return self.gathered
