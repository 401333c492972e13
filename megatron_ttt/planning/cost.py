"""Parameters, FLOPs and checkpoint bytes of a model, and what devices can do."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ttt.config import Config, ModelConfig
from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import Microbatch
from megatron_ttt.stack import dimensions, layer_parameters, mixer_of

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU by its vendor's data sheet: dense bf16 FLOP/s, memory in GiB (the vendors' GB), bytes
    a second in one direction over the links to its neighbours in a node."""

    flops: float
    memory: float
    link: float


# The first of which every word stands in the device's name is that device.
DEVICES = {
    "GB200": Device(2500e12, 186, 900e9),
    "B200": Device(2250e12, 180, 900e9),
    "GH200": Device(989e12, 96, 450e9),
    "H200": Device(989e12, 141, 450e9),
    "H100 PCIe": Device(756e12, 80, 64e9),
    "H100 NVL": Device(835e12, 94, 300e9),
    "H100": Device(989e12, 80, 450e9),
    "A100 40GB": Device(312e12, 40, 300e9),
    "A100": Device(312e12, 80, 300e9),
    "L40S": Device(362e12, 48, 32e9),
    "A6000": Device(155e12, 48, 32e9),
    "RTX 4090": Device(165e12, 24, 32e9),
}


def find_device(name: str) -> Device:
    """The device that `--gpu NAME` means. Raises UserError for an unknown one."""
    if (device := _device(name)) is None:
        raise UserError(f"--gpu {name} is unknown here: name one of {', '.join(DEVICES)}")
    return device


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak, FLOP/s; None where it is not known."""
    device = _device(device_name)
    return device and device.flops


def _device(name: str) -> Device | None:
    if " mig " in name.lower():  # a slice of a GPU
        return None
    for known, device in DEVICES.items():
        if all(word in name.lower() for word in known.lower().split()):
            return device
    return None


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by place: embedding (tied to the head), one layer's mixer, its fp32 part, its FFN,
    and the whole."""
    embedding = model.vocab_size * model.hidden_size
    rows = layer_parameters(model)
    layer = sum(row.numel for row in rows)
    return {
        "embedding": embedding,
        "mixer": sum(row.numel for row in rows if row.name.startswith("self_attention.")),
        "fp32": sum(row.numel for row in rows if row.fp32),
        "ffn": sum(row.numel for row in rows if row.name.startswith("mlp.")),
        "layer": layer,
        "total": embedding + model.num_layers * layer + model.hidden_size,
    }


def parameters_of_rank(config: Config) -> tuple[int, int]:
    """(parameters, of which float32 in a bf16 model) of a rank of the first or the last stage,
    which both hold the embedding."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    own = [
        (row, row.numel // (tp if row.shard_dim is not None else 1))
        for row in layer_parameters(model)
    ]
    layer, fp32 = sum(n for _, n in own), sum(n for row, n in own if row.fp32)
    vocabulary = -(-model.vocab_size // tp)
    ends = vocabulary * model.hidden_size + model.hidden_size
    return layers * layer + ends, layers * fp32


def checkpoint_bytes(config: Config) -> dict[str, int]:
    """Bytes on disk: of a checkpoint (weights, main weights, two moments), of an export."""
    counts = count_parameters(config.model)
    fp32 = config.model.num_layers * counts["fp32"]
    rounded = counts["total"] - fp32
    weights = (2 if config.training.precision == "bf16" else 4) * rounded + 4 * fp32
    # The optimizer's main copy is stored of every parameter, in float32 models too.
    return {"checkpoint": weights + 12 * counts["total"], "export": weights}


def forward_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Model FLOPs of a token's forward pass (docs/mathematics.md, cost)."""
    mixer, options = mixer_of(model)
    D = model.hidden_size
    layer = mixer.flops_per_token(dimensions(model), options, seq_length)
    layer += 6 * D * model.ffn_hidden_size
    return model.num_layers * layer + 2 * model.vocab_size * D


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward, recomputation not counted."""
    return 3 * forward_flops_per_token(model, seq_length)


def microbatch(config: Config, *, on_cpu: bool = False) -> Microbatch:
    """Return what one forward pass of a rank sees."""
    training, parallel = config.training, config.parallel
    return Microbatch(
        sequences=training.micro_batch_size,
        seq_length=training.seq_length,
        dims=dimensions(config.model),
        width=2 if training.precision == "bf16" else 4,
        tp=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        on_cpu=on_cpu,
        backend=training.scan_backend,
    )
