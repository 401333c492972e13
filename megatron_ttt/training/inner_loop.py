"""The inner loop of every layer, looked at while a batch passes: for the log, and for people."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.mixers.ttt.layer import TTTMixer
from megatron_ttt.mixers.ttt.statistics import InnerStatistics, inner_statistics

SEQUENCES = 2
"""Of each data-parallel rank's microbatch: what the statistics in a run's log are taken on."""


def sample_of(microbatches: list[Tensor]) -> list[Tensor]:
    """The few sequences to look at: as many microbatches as the pipeline schedule asks for."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return [tokens[:SEQUENCES] for tokens in microbatches[:stages]]


@torch.no_grad()
def observe_inner_loop(
    chunks: list[nn.Module], run_forward: Callable[[], object]
) -> InnerStatistics:
    """The statistics of every TTT layer, over all heads and data-parallel ranks. Collective.

    chunks: unwrapped. run_forward: passes one or more batches through them, without gradients.
    Returns fields [layers, N] and [layers], in float64 on the CPU, the same on every rank.
    """
    seen: dict[int, list[InnerStatistics]] = {}

    def observer(layer: int):
        return lambda *inputs: seen.setdefault(layer, []).append(inner_statistics(*inputs))

    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    mixers = {layer.layer_number - 1: layer.self_attention for layer in layers}
    if not all(isinstance(mixer, TTTMixer) for mixer in mixers.values()):
        raise ValueError("only TTT layers have an inner loop")
    for layer, mixer in mixers.items():
        mixer.observer = observer(layer)
    try:
        run_forward()
    finally:
        for mixer in mixers.values():
            mixer.observer = None

    # Every layer is on one pipeline stage, on each of its tensor- and data-parallel ranks.
    copies = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    sums = []
    for field in zip(*(zip(*batches) for batches in seen.values())):
        own = [torch.stack(batches).double().mean(0) for batches in field]
        everyones = own[0].new_zeros(chunks[0].config.num_layers, *own[0].shape)
        everyones[list(seen)] = torch.stack(own) / copies
        sums.append(everyones)
    for field in sums:
        dist.all_reduce(field)
    return InnerStatistics(*(field.cpu() for field in sums))


def inner_metrics(statistics: InnerStatistics) -> dict[str, float]:
    """Names for the log, such as `inner/layer_03/loss_after` (layers count from 1), and numbers:
    a layer's means over its mini-batches."""
    return {
        f"inner/layer_{layer:02d}/{name}": float(f"{value:.6g}")
        for name, values in _by_layer(statistics).items()
        for layer, value in enumerate(values, start=1)
    }


def inner_table(statistics: InnerStatistics) -> str:
    """The health of the inner loop, a line a layer."""
    by_layer = _by_layer(statistics)
    lines = [
        "layer   inner loss: W0, before, after   variance  inner lr     tau  at 0    state norm"
        "  finite"
    ]
    for layer, values in enumerate(zip(*by_layer.values()), start=1):
        of = dict(zip(by_layer, values))
        lines.append(
            f"{layer:>5}  {of['loss_init']:>9.4g} {of['loss_before']:>9.4g} "
            f"{of['loss_after']:>9.4g}  {of['target_var']:>9.4g}  {of['inner_lr']:>8.2e}  "
            f"{of['token_scale']:>6.3f}  {of['token_scale_clamped']:>4.0%}  "
            f"{of['state_norm_init']:>5.3g} > {of['state_norm']:<5.3g} {of['finite']:>6.1%}"
        )
    return "\n".join(lines)


def _by_layer(statistics: InnerStatistics) -> dict[str, list[float]]:
    """Each field's numbers by layer, those of mini-batches averaged."""
    return {
        name: field.reshape(len(field), -1).mean(1).tolist()
        for name, field in statistics._asdict().items()
    }
