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
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.checkpoint.writer import Checks
from megatron_ttt.errors import TrainingError
from megatron_ttt.model import global_parameters
from megatron_ttt.stack import EMBEDDING
from megatron_ttt.training.optimizer import KINDS

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


class RankChecksums(NamedTuple):
    """What one rank sees in its own memory, in plain numbers: one process can tell another."""

    names: list[str]
    cut: list[bool]
    """Whether the parameter is cut over tensor-parallel ranks."""
    sums: list[list[int]]
    """Of each parameter: checksums of this rank's copy of the weight, then of its shard of each of
    KINDS (0 where it has none), and whether the weight is not what its main parameter rounds to."""


@torch.no_grad()
def compute_checksums(chunks: list[nn.Module], optimizer) -> RankChecksums:
    """Sum up what is here; not collective. The weights must be current (`gather_parameters`)."""
    names, cut, sums = [], [], []
    for name, parameter, shard in shards(chunks, optimizer):
        names.append(name)
        cut.append(getattr(parameter, "tensor_model_parallel", False))
        none = torch.zeros((), dtype=torch.int64, device=parameter.device)
        parts, differs = [none] * len(KINDS), none
        if shard is not None:
            parts = [checksum(shard.state[kind]) for kind in KINDS]
            # An fp32 weight is its own main parameter.
            if shard.weight.dtype != torch.float32:
                rounded = shard.state["param"].to(shard.weight.dtype)
                differs = (rounded.view(torch.int16) != shard.weight.view(torch.int16)).any()
        sums.append(torch.stack([checksum(parameter), *parts, differs.to(torch.int64)]))
    return RankChecksums(names, cut, torch.stack(sums).tolist())


def compare_checksums(seen: RankChecksums, step: int, device: torch.device) -> dict[str, str]:
    """The optimizer's checksums, for state.json, of what all ranks have seen at a step.

    Collective; every rank gets the same. Raises TrainingError on all of them where copies, or a
    weight and its main parameter, differ.
    """
    sums, differing_state = optimizer_checksums(seen, device)
    unlike_main = {name for name, row in zip(seen.names, seen.sums) if row[-1]}
    for what, names in (
        ("copies of {} parameters differ between ranks", differing_weights(seen, device)),
        ("copies of the optimizer state of {} parameters differ between ranks", differing_state),
        (
            "{} parameters are not what the optimizer's main parameters round to",
            said_by_any(unlike_main),
        ),
    ):
        if names:
            raise TrainingError(
                f"{what.format(len(names))} at step {step}, {names[0]} among them: some rank's "
                "memory or network is faulty; resume from the last checkpoint on other machines"
            )
    return to_json(sums)


def save_checks(chunks: list[nn.Module], optimizer, step: int, device: torch.device) -> Checks:
    """Return the checks of a save with current weights: are copies what they must be, and what is
    in the optimizer, for state.json. They raise TrainingError where that cannot be published."""
    return Checks(
        compute=partial(compute_checksums, chunks, optimizer),
        compare=lambda seen: {"optimizer_checksums": compare_checksums(seen, step, device)},
    )


def check_loaded(checkpoint: Checkpoint, chunks: list[nn.Module], optimizer) -> None:
    """Raise TrainingError unless the optimizer is what it was when the checkpoint was saved.
    Collective."""
    saved = checkpoint.state.get("optimizer_checksums")
    if saved is None:
        return
    seen = compute_checksums(chunks, optimizer)
    device = next(chunks[0].parameters()).device
    loaded = to_json(optimizer_checksums(seen, device)[0])
    if difference := first_difference(saved, loaded):
        raise TrainingError(
            f"{checkpoint.path} does not give back the optimizer that was saved ({difference} "
            "differs): it was damaged in memory; go back to an earlier one (checkpoint.load)"
        )


def differing_weights(seen: RankChecksums, device: torch.device) -> list[str]:
    """Parameters whose copies on other ranks hold other bits, by name. Collective.

    Every parameter has a copy on each data-parallel rank; those that are not cut also one on each
    tensor-parallel rank.
    """
    found = set()
    copies = [(name, cut, row[0]) for name, cut, row in zip(*seen)]
    for group, compared in (
        (parallel_state.get_data_parallel_group(), copies),
        (parallel_state.get_tensor_model_parallel_group(), [c for c in copies if not c[1]]),
    ):
        if group.size() == 1 or not compared:
            continue
        sums = torch.tensor([number for *_, number in compared], device=device)
        everyones = [torch.empty_like(sums) for _ in range(group.size())]
        dist.all_gather(everyones, sums, group=group)
        same = (torch.stack(everyones) == sums).all(0).tolist()
        found |= {name for (name, *_), equal in zip(compared, same) if not equal}
    return said_by_any(found)


def optimizer_checksums(seen: RankChecksums, device: torch.device) -> tuple[Sums, list[str]]:
    """The checksums of the whole state, and the names where copies of it differ between ranks.

    Collective; every rank gets the same.
    """
    table = torch.tensor([row[1:-1] for row in seen.sums], device=device)
    dist.all_reduce(table, group=parallel_state.get_data_parallel_group())

    group = parallel_state.get_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    everyones = [None] * group.size()
    own = (stage, seen.names, seen.cut, table.tolist())
    dist.all_gather_object(everyones, own, group=group)
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


def said_by_any(found: set[str]) -> list[str]:
    """What is in any rank's set, the same on every rank. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return sorted(set().union(*everyone))


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, taken as integers, as far as 32 bits hold it: an int64 scalar."""
    integers = torch.int16 if tensor.element_size() == 2 else torch.int32
    # In int32, which wraps: five times as fast as a sum that widens each number.
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int32).to(torch.int64)
