"""The inner loop of every layer, looked at while a batch passes: for the log, and for people."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.mixers.inner_loop import InnerLoop, InnerStatistics

SEQUENCES = 2
"""Of each data-parallel rank's microbatch: what the statistics in a run's log are taken on."""


def sample_of(microbatches: list[Tensor]) -> list[Tensor]:
    """The few sequences to look at: as many microbatches as the pipeline schedule asks for."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return [tokens[:SEQUENCES] for tokens in microbatches[:stages]]


@torch.no_grad()
def observe_inner_loop(
    chunks: list[nn.Module], run_forward: Callable[[], object]
) -> dict[int, InnerStatistics]:
    """Return the statistics of every layer that has an inner loop, by its number from 0.

    They are means over all heads, data-parallel ranks and batches, in float64 on the CPU, the same
    on every rank. Collective. chunks: unwrapped. run_forward: passes one or more batches through
    them, without gradients.
    """
    seen: dict[int, list[InnerStatistics]] = {}
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    mixers = {
        layer.layer_number - 1: layer.self_attention
        for layer in layers
        if isinstance(layer.self_attention, InnerLoop)
    }
    for number, mixer in mixers.items():
        mixer.observer = seen.setdefault(number, []).append
    try:
        run_forward()
    finally:
        for mixer in mixers.values():
            mixer.observer = None

    # A layer is on one pipeline stage, on each of its tensor- and data-parallel ranks.
    stage = parallel_state.get_tensor_and_data_parallel_group()
    own = {}
    for number, batches in seen.items():
        fields = [torch.stack(field).double().mean(0) for field in zip(*batches)]
        for field in fields:
            dist.all_reduce(field, group=stage)
        own[number] = InnerStatistics(*((field / stage.size()).cpu() for field in fields))
    stages = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return dict(sorted((number, of) for stage in stages for number, of in stage.items()))


def inner_metrics(statistics: dict[int, InnerStatistics]) -> dict[str, float]:
    """Return names for the log, such as `inner/layer_03/loss_after` (layers count from 1), and
    numbers: a layer's means over its mini-batches."""
    return {
        f"inner/layer_{number + 1:02d}/{name}": float(f"{value:.6g}")
        for name in InnerStatistics._fields
        for number, of in statistics.items()
        for value in [getattr(of, name).mean().item()]
    }


def inner_table(statistics: dict[int, InnerStatistics]) -> str:
    """Return the health of the inner loop, a line a layer."""
    lines = [
        "layer   inner loss: W0, before, after   variance  inner lr     tau  at 0    state norm"
        "  finite"
    ]
    for number, fields in statistics.items():
        of = InnerStatistics(*(field.mean().item() for field in fields))
        lines.append(
            f"{number + 1:>5}  {of.loss_init:>9.4g} {of.loss_before:>9.4g} "
            f"{of.loss_after:>9.4g}  {of.target_var:>9.4g}  {of.inner_lr:>8.2e}  "
            f"{of.token_scale:>6.3f}  {of.token_scale_clamped:>4.0%}  "
            f"{of.state_norm_init:>5.3g} > {of.state_norm:<5.3g} {of.finite:>6.1%}"
        )
    return "\n".join(lines)
