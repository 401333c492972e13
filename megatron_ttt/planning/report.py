"""`--dry-run`: a configuration's figures, in words and as JSON."""

from __future__ import annotations

from typing import Any

from megatron_ttt.config import Config, check_layout
from megatron_ttt.data.blend import times_read
from megatron_ttt.errors import UserError
from megatron_ttt.planning.communication import bytes_per_step
from megatron_ttt.planning.cost import (
    GIB,
    checkpoint_bytes,
    count_parameters,
    find_device,
    training_flops_per_token,
)
from megatron_ttt.planning.layouts import rank_layouts, step_seconds
from megatron_ttt.planning.memory import memory_per_rank
from megatron_ttt.stack import architecture_of

SUGGESTIONS = 3
USUAL_MFU = 0.4
"""What layouts are ranked with where no --mfu is given."""


def dry_run(
    config: Config,
    world_size: int | None,
    *,
    gpu: str | None = None,
    mfu: float | None = None,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """The figures of `--dry-run`.

    world_size: None for one copy of the model's processes. gpu: plan for this device; None: for
    what a run would use here. mfu: the share of its peak that is reached. memory_gib: of a GPU;
    None: the device's. Raises UserError for what cannot be.
    """
    parallel, training, architecture = config.parallel, config.training, architecture_of(config)
    world_size = parallel.model_parallel_size if world_size is None else world_size
    if world_size < 1:
        raise UserError(f"--world-size {world_size} is no number of processes")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu} is no share: give a number up to 1, as 0.4")
    device = None if gpu is None else find_device(gpu)
    if device is None and (mfu is not None or memory_gib is not None):
        raise UserError("--mfu and --memory need --gpu: name the device to plan for")
    dp = check_layout(config, world_size)
    on_cpu = device is None and _runs_on_cpu(config)
    tokens_per_step = training.global_batch_size * training.seq_length
    flops = training_flops_per_token(architecture, training.seq_length)
    memory = memory_per_rank(config, dp, on_cpu=on_cpu)
    plan = {
        "parameters": count_parameters(architecture)["total"],
        "world_size": world_size,
        "data_parallel_size": dp,
        "microbatches_per_step": training.global_batch_size // (training.micro_batch_size * dp),
        "steps": training.steps,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * training.steps,
        "times_read": _times_read(config),
        "flops_per_token": flops,
        "flops": flops * tokens_per_step * training.steps,
        "device": "cpu" if on_cpu else gpu or "cuda",
        "memory_gib_per_rank": {**memory, "total": round(sum(memory.values()), 3)},
        "disk_gib": {k: round(v / GIB, 3) for k, v in checkpoint_bytes(config).items()},
        "sent_gib_per_step": {
            kind: round(size / GIB, 3) for kind, size in bytes_per_step(config, dp).items()
        },
    }
    if device is None:
        return plan
    if mfu is not None:
        time = step_seconds(config, world_size, device, mfu)
        plan["step_seconds"] = round(time["seconds"], 4)
        plan["hours"] = round(time["seconds"] * training.steps / 3600, 2)
    room = device.memory if memory_gib is None else memory_gib
    layouts = rank_layouts(config, world_size, device, mfu or USUAL_MFU, room)
    plan["fits"] = plan["memory_gib_per_rank"]["total"] <= room
    plan["layouts"] = [layout.as_dict() for layout in layouts[:SUGGESTIONS]]
    return plan


def _times_read(config: Config) -> dict[str, float] | None:
    """How often each dataset of `data.train` is read; None where there is none, or not here."""
    training = config.training
    if not config.data.train:
        return None
    samples = training.steps * training.global_batch_size
    try:
        times = times_read(config.data.train, samples, training.seq_length)
    except UserError:
        return None
    return {prefix: round(passes, 4) for prefix, passes in times.items()}


def _runs_on_cpu(config: Config) -> bool:
    """What `run.device` comes to on this machine."""
    if config.run.device != "auto":
        return config.run.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def describe(config: Config, plan: dict[str, Any]) -> str:
    """The plan in words, for a terminal."""
    model, parallel, memory = config.model, config.parallel, plan["memory_gib_per_rank"]
    lines = [
        f"{architecture_of(config).label}, {plan['parameters'] / 1e6:.1f}M parameters: "
        f"{model.num_layers} layers, "
        f"{model.num_heads} heads of {model.head_dim}, width {model.hidden_size}",
        f"{plan['world_size']} processes: TP {parallel.tensor_model_parallel_size}, "
        f"PP {parallel.pipeline_model_parallel_size}, DP {plan['data_parallel_size']}; "
        f"{plan['microbatches_per_step']} microbatches of "
        f"{config.training.micro_batch_size} x {config.training.seq_length} tokens a step",
        f"{plan['steps']:,} steps, {plan['tokens'] / 1e9:.2f}B tokens, {plan['flops']:.2e} FLOP",
        f"GiB on the fullest rank ({plan['device']}, estimate): {_parts(memory)}",
        f"GiB a rank sends in a step: {_parts(plan['sent_gib_per_step'])}",
        f"GiB on disk: {_parts(plan['disk_gib'])}",
    ]
    if plan["times_read"] is not None:
        times = ", ".join(f"{prefix} {n:.2f}" for prefix, n in plan["times_read"].items())
        lines.append(f"Times that the data is read: {times}")
    elif config.data.train:
        lines.append("Times that the data is read: unknown, it is not here")
    if "step_seconds" in plan:
        lines.append(f"{plan['step_seconds']:.2f} s a step, {plan['hours']:.1f} hours in all")
    if "fits" in plan:
        lines.append("It fits." if plan["fits"] else "It does not fit. What does:")
        lines += [
            f"  {layout['memory_gib']:6.1f} GiB  {' '.join(layout['overrides'])}"
            for layout in plan["layouts"]
        ] or ["  nothing on so many GPUs: give more, or --memory"]
    return "\n".join(lines)


def _parts(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
