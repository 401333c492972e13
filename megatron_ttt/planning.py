"""What a configuration will cost, from arithmetic alone: parameters, FLOPs, memory."""

from __future__ import annotations

from typing import Any

from megatron_ttt.config import Config, ModelConfig, check_layout
from megatron_ttt.errors import UserError

GIB = 2**30

# Dense bf16 peak in FLOP/s by substring of the device's name (the vendors' data sheets).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak, FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by place: embedding (tied to the head), one layer's mixer, its fp32 part, its FFN
    and norms, and the whole."""
    D, nh, f, K = model.hidden_size, model.num_heads, model.head_dim, model.mini_batch_size
    conv = D * model.conv_kernel + D
    ffn = 3 * D * model.ffn_hidden_size
    norms = 2 * D
    fp32 = 0
    mixer = 4 * D * D
    if model.is_ttt:
        state = f * f + f if model.layer == "ttt_linear" else 8 * f * f + 5 * f
        fp32 = nh * (state + 2 * f + D + 1) + K
        mixer += fp32 + 2 * D  # post-norm
    if model.is_mamba:
        mixer += 2 * conv
        norms += D + conv
    embedding = model.vocab_size * D
    layer = mixer + ffn + norms
    return {
        "embedding": embedding,
        "mixer": mixer,
        "fp32": fp32,
        "ffn": ffn,
        "layer": layer,
        "total": embedding + model.num_layers * layer + D,
    }


def forward_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Model FLOPs of a token's forward pass (docs/mathematics.md, cost)."""
    D, f, K = model.hidden_size, model.head_dim, model.mini_batch_size
    scan = {
        "ttt_linear": D * (6 * f + 4 * K),
        "ttt_mlp": D * (56 * f + 20 * K),
        "attention": 2 * D * (seq_length + 1),
    }[model.layer]
    layer = scan + 8 * D * D + 6 * D * model.ffn_hidden_size
    return model.num_layers * layer + 2 * model.vocab_size * D


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward, recomputation not counted."""
    return 3 * forward_flops_per_token(model, seq_length)


def memory_per_rank(config: Config, dp: int) -> dict[str, float]:
    """Estimate in GiB of the fullest rank: weights, gradients, optimizer state, activations."""
    model, training, parallel = config.model, config.training, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts = count_parameters(model)
    layers = model.num_layers // pp
    parameters = (layers * counts["layer"] + counts["embedding"]) / tp
    fp32 = layers * counts["fp32"] / tp
    width = 2 if training.precision == "bf16" else 4
    weights = width * (parameters - fp32) + 4 * fp32
    tokens = training.micro_batch_size * training.seq_length
    D, ffn = model.hidden_size, model.ffn_hidden_size
    # Tensors a layer keeps for its backward, in units of one activation of width D a token.
    sharded = 3 + 3 + 3 * ffn / D + (6 if model.is_ttt else 2)
    whole = 5 + (4 if model.is_mamba else 0)
    kept = sharded / tp + whole / (tp if parallel.sequence_parallel else 1)
    per_layer = (1 if training.recompute else kept) * D * tokens * width
    in_flight = pp if pp > 1 else 1
    logits = 3 * 4 * tokens * model.vocab_size / tp
    activations = per_layer * layers * in_flight + logits
    if training.recompute:
        activations += kept * D * tokens * width
    return {
        "weights": weights / GIB,
        "gradients": 4 * parameters / GIB,
        # Two moments, and a main copy of what is not float32 already; sharded over DP.
        "optimizer": (8 * parameters + (4 * (parameters - fp32) if width == 2 else 0)) / dp / GIB,
        "activations": activations / GIB,
    }


def describe(config: Config, plan: dict[str, Any]) -> str:
    """The plan in words, for a terminal."""
    model, parallel, memory = config.model, config.parallel, plan["memory_gib_per_rank"]
    lines = [
        f"{model.layer}, {plan['parameters'] / 1e6:.1f}M parameters: {model.num_layers} layers, "
        f"{model.num_heads} heads of {model.head_dim}, width {model.hidden_size}",
        f"{plan['world_size']} processes: TP {parallel.tensor_model_parallel_size}, "
        f"PP {parallel.pipeline_model_parallel_size}, DP {plan['data_parallel_size']}; "
        f"{plan['microbatches_per_step']} microbatches of "
        f"{config.training.micro_batch_size} x {config.training.seq_length} tokens a step",
        f"{plan['steps']:,} steps, {plan['tokens'] / 1e9:.2f}B tokens, {plan['flops']:.2e} FLOP",
        "GiB on the fullest rank (estimate): "
        + ", ".join(f"{name} {size:.2f}" for name, size in memory.items()),
    ]
    return "\n".join(lines)


def dry_run(config: Config, world_size: int | None) -> dict[str, Any]:
    """The figures of `--dry-run`. world_size: None for one copy of the model's processes."""
    parallel, training = config.parallel, config.training
    world_size = parallel.model_parallel_size if world_size is None else world_size
    if world_size < 1:
        raise UserError(f"--world-size {world_size} is no number of processes")
    dp = check_layout(config, world_size)
    tokens_per_step = training.global_batch_size * training.seq_length
    flops = training_flops_per_token(config.model, training.seq_length)
    memory = memory_per_rank(config, dp)
    return {
        "parameters": count_parameters(config.model)["total"],
        "world_size": world_size,
        "data_parallel_size": dp,
        "microbatches_per_step": training.global_batch_size // (training.micro_batch_size * dp),
        "steps": training.steps,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * training.steps,
        "flops_per_token": flops,
        "flops": flops * tokens_per_step * training.steps,
        "memory_gib_per_rank": {
            **{name: round(size, 3) for name, size in memory.items()},
            "total": round(sum(memory.values()), 3),
        },
    }
