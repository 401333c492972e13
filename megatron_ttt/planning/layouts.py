"""Which layouts a number of GPUs can take, and how they compare (docs/planning.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megatron_ttt.config import Config, check_layout
from megatron_ttt.errors import UserError
from megatron_ttt.planning.communication import bytes_per_step
from megatron_ttt.planning.cost import Device, training_flops_per_token
from megatron_ttt.planning.memory import memory_per_rank
from megatron_ttt.stack import architecture_of

NODE = 8
"""GPUs of a node: tensor parallelism stays within it."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to another node: 400 Gb/s."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out, with what it is expected to take."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int
    sequence_parallel: bool
    recompute: bool
    memory_gib: float
    step_seconds: float
    bubble: float
    sent_gib: float

    def overrides(self) -> list[str]:
        """The layout as arguments of pretrain_ttt.py."""
        return [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.recompute={str(self.recompute).lower()}",
        ]

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "overrides": self.overrides()}


def step_seconds(config: Config, world_size: int, device: Device, mfu: float) -> dict[str, float]:
    """Seconds of an optimizer step, and the share of it that pipeline stages stand idle.

    mfu: the share of the device's peak that is reached while computing. Communication of tensor and
    pipeline parallelism is added at the links' speed; of data parallelism what exceeds the backward
    pass, which it overlaps with (`parallel.overlap`), or all of it.
    """
    training, parallel = config.training, config.parallel
    dp = check_layout(config, world_size)
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    tokens = training.global_batch_size * training.seq_length
    flops = training_flops_per_token(architecture_of(config), training.seq_length) * tokens
    compute = flops * (4 / 3 if training.recompute else 1) / (world_size * device.flops * mfu)
    sent = bytes_per_step(config, dp)
    across = device.link if world_size <= NODE else NETWORK
    within = sent["tensor"] / device.link + sent["pipeline"] / across
    data = sent["data"] / across
    if parallel.overlap:
        data = max(0.0, data - 2 / 3 * compute)
    idle = (pp - 1) / (chunks * microbatches)
    busy = (compute + within) * (1 + idle)
    return {"seconds": busy + data, "bubble": idle / (1 + idle)}


def rank_layouts(
    config: Config, world_size: int, device: Device, mfu: float, memory_gib: float
) -> list[Layout]:
    """Every layout that `world_size` GPUs of `memory_gib` can take, the fastest first.

    Sequence parallelism goes with tensor parallelism; recomputation is tried where a layout does
    not fit without. On equal times the larger micro-batch is first: it fills a device better.
    Raises UserError for a memory_gib that is no size.
    """
    if not memory_gib > 0:  # NaN is not
        raise UserError(f"--memory {memory_gib} is no size: give GiB above 0")
    found = []
    for candidate in _candidates(config, world_size):
        for recompute in (False, True):
            candidate.training.recompute = recompute
            parallel, training = candidate.parallel, candidate.training
            dp = world_size // parallel.model_parallel_size
            memory = sum(memory_per_rank(candidate, dp, on_cpu=False).values())
            if memory > memory_gib:
                continue
            time = step_seconds(candidate, world_size, device, mfu)
            found.append(
                Layout(
                    tensor=parallel.tensor_model_parallel_size,
                    pipeline=parallel.pipeline_model_parallel_size,
                    data=dp,
                    micro_batch_size=training.micro_batch_size,
                    sequence_parallel=parallel.sequence_parallel,
                    recompute=recompute,
                    memory_gib=round(memory, 2),
                    step_seconds=round(time["seconds"], 4),
                    bubble=round(time["bubble"], 4),
                    sent_gib=round(bytes_per_step(candidate, dp)["total"] / 2**30, 2),
                )
            )
            break
    return sorted(found, key=lambda x: (x.step_seconds, -x.micro_batch_size, x.memory_gib))


def _candidates(config: Config, world_size: int) -> Iterator[Config]:
    """The configuration at every TP, PP and micro-batch size that `check_layout` takes."""
    model, batch = config.model, config.training.global_batch_size
    for tp in _divisors(model.num_heads, min(NODE, world_size)):
        for pp in _divisors(model.num_layers, world_size // tp):
            for micro_batch_size in _divisors(batch, batch):
                candidate = copy.deepcopy(config)
                candidate.parallel.tensor_model_parallel_size = tp
                candidate.parallel.sequence_parallel = tp > 1
                candidate.parallel.pipeline_model_parallel_size = pp
                candidate.parallel.virtual_pipeline_model_parallel_size = None
                candidate.training.micro_batch_size = micro_batch_size
                try:
                    check_layout(candidate, world_size)
                except UserError:
                    continue
                yield candidate


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
