"""Silent corruption of the optimizer's state: what can be compared with something, is.

The state lies in shards, one on each data-parallel rank, and changes with every step. Three things
hold nevertheless: a bf16 weight is its fp32 main parameter, rounded; what is not cut is the same on
every tensor-parallel rank, and the tied embedding on both its pipeline stages; and a checkpoint,
when it is loaded, gives back the state that was in memory when it was saved, at any layout.

A checksum is the sum of a tensor's bits, taken as integers, modulo 2^32: those of shards add up to
the whole's. Padding of the vocabulary does not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.model import EMBEDDING, global_parameters
from megatron_ttt.training.health import checksum, said_by_any

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Per parameter: the main parameter and AdamW's two moments."""

Sums = dict[str, tuple[int, ...]]
"""A checksum for each of KINDS, by the parameter's global name."""


class Shard(NamedTuple):
    """This rank's part of a parameter, flattened: of the weight, and of each of KINDS."""

    weight: Tensor
    state: dict[str, Tensor]


def shards(chunks: list[nn.Module], optimizer) -> Iterator[tuple[str, nn.Parameter, Shard | None]]:
    """(name, parameter, what this rank holds of its state) of unwrapped chunks' parameters."""
    owners = {
        parameter: inner
        for inner in optimizer.chained_optimizers
        for parameter in inner.model_param_group_index_map
    }
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            if (inner := owners.get(parameter)) is None:
                yield name, parameter, None
                continue
            span = inner._get_model_param_range_map(parameter)["param"]
            real = parameter.numel()
            if name == EMBEDDING:
                rank = parallel_state.get_tensor_model_parallel_rank()
                rows = chunk.real_vocab_size - rank * len(parameter)
                real = min(max(rows, 0), len(parameter)) * parameter.shape[1]
            end = max(span.start, min(span.end, real))
            state = inner._get_main_param_and_optimizer_states(parameter)
            yield (
                name,
                parameter,
                Shard(
                    parameter.detach().flatten()[span.start : end],
                    {kind: state[kind].detach()[: end - span.start] for kind in KINDS},
                ),
            )


def differing_main_parameters(chunks: list[nn.Module], optimizer) -> list[str]:
    """Parameters that are not, bit for bit, what their main parameters round to. Collective."""
    found = set()
    for name, _, shard in shards(chunks, optimizer):
        # An fp32 weight is its own main parameter.
        if shard is not None and shard.weight.dtype != torch.float32:
            rounded = shard.state["param"].to(shard.weight.dtype)
            if not torch.equal(rounded.view(torch.int16), shard.weight.view(torch.int16)):
                found.add(name)
    return said_by_any(found)


def optimizer_checksums(chunks: list[nn.Module], optimizer) -> tuple[Sums, list[str]]:
    """The checksums of the whole state, and the names where copies of it differ between ranks.

    Collective; every rank gets the same. The weights must be current (`gather_parameters`).
    """
    names, cut, sums = [], [], []
    for name, parameter, shard in shards(chunks, optimizer):
        names.append(name)
        cut.append(getattr(parameter, "tensor_model_parallel", False))
        none = torch.zeros((), dtype=torch.int64, device=parameter.device)
        parts = [none] * len(KINDS) if shard is None else map(checksum, shard.state.values())
        sums.append(torch.stack(list(parts)))
    table = torch.stack(sums)
    dist.all_reduce(table, group=parallel_state.get_data_parallel_group())

    group = parallel_state.get_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    everyones = [None] * group.size()
    dist.all_gather_object(everyones, (stage, names, cut, table.tolist()), group=group)
    # Of each parameter: by stage (the embedding is on two), the sums of its tensor-parallel ranks.
    seen: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    is_cut = {}
    for stage, *columns in everyones:
        for name, cut, row in zip(*columns):
            seen[name][stage].append(row)
            is_cut[name] = cut
    whole, differing = {}, set()
    for name, stages in seen.items():
        if is_cut[name]:
            copies = [tuple(sum(kind) % 2**32 for kind in zip(*rows)) for rows in stages.values()]
        else:
            copies = [tuple(n % 2**32 for n in row) for rows in stages.values() for row in rows]
        whole[name] = copies[0]
        if any(copy != copies[0] for copy in copies):
            differing.add(name)
    return whole, sorted(differing)


def to_json(sums: Sums) -> dict[str, str]:
    """Checksums for state.json, a line a parameter."""
    return {name: " ".join(f"{n:08x}" for n in row) for name, row in sums.items()}


def first_difference(saved: dict[str, str], loaded: dict[str, str]) -> str | None:
    """What differs between two results of `to_json`, in words; None where nothing does."""
    for name in sorted(saved.keys() | loaded.keys()):
        there, here = (sums.get(name, "").split() for sums in (saved, loaded))
        if there != here:
            kinds = [kind for kind, a, b in zip(KINDS, there, here) if a != b]
            return f"{' and '.join(kinds or KINDS)} of {name}"
    return None
