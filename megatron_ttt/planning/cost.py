"""Parameters, FLOPs and checkpoint bytes of a model, and what devices can do."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ttt.config import Config
from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import Microbatch
from megatron_ttt.stack import Architecture, architecture_of

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


def count_parameters(architecture: Architecture) -> dict[str, int]:
    """Return parameters by place: embedding (and head, where it has its own weight), the mixers,
    those that stay fp32, the SwiGLUs, and the whole."""
    rows = architecture.parameters().values()

    def count(part: str) -> int:
        return sum(row.numel for row in rows if part in row.name)

    return {
        "embedding": count("word_embeddings") + count("output_layer"),
        "mixer": count(".self_attention."),
        "fp32": sum(row.numel for row in rows if row.fp32),
        "ffn": count(".mlp."),
        "total": sum(row.numel for row in rows),
    }


def layers_of_stage(config: Config, stage: int) -> list[str]:
    """Return the kinds of the layers that a pipeline stage has."""
    parallel, kinds = config.parallel, architecture_of(config).layer_kinds
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    size = len(kinds) // (stages * chunks)
    starts = [(chunk * stages + stage) * size for chunk in range(chunks)]
    return [kind for start in starts for kind in kinds[start : start + size]]


def parameters_of_rank(config: Config, stage: int = 0) -> tuple[int, int]:
    """Return (parameters, of which float32 in a bf16 model) of a rank of a pipeline stage. The
    first and the last both hold the embedding where it is the head too."""
    model, parallel, architecture = config.model, config.parallel, architecture_of(config)
    tp = parallel.tensor_model_parallel_size
    total = fp32 = 0
    for kind in layers_of_stage(config, stage):
        for row in architecture.layer_parameters(kind):
            own = row.numel // (tp if row.shard_dim is not None else 1)
            total += own
            fp32 += own if row.fp32 else 0
    stages = parallel.pipeline_model_parallel_size
    vocabulary = -(-model.vocab_size // tp) * model.hidden_size
    if stage in (0, stages - 1):
        # The final norm is on the last stage alone, but too small to tell the two apart.
        total += vocabulary + model.hidden_size
        if stages == 1 and not model.tie_word_embeddings:
            total += vocabulary
    return total, fp32


def checkpoint_bytes(config: Config) -> dict[str, int]:
    """Return bytes on disk: of a checkpoint (weights, main weights, two moments), of an export."""
    counts = count_parameters(architecture_of(config))
    rounded = counts["total"] - counts["fp32"]
    weights = (2 if config.training.precision == "bf16" else 4) * rounded + 4 * counts["fp32"]
    # The optimizer's main copy is stored of every parameter, in float32 models too.
    return {"checkpoint": weights + 12 * counts["total"], "export": weights}


def forward_flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Return the model FLOPs of a token's forward pass (docs/mathematics.md, cost)."""
    model, dims = architecture.model, architecture.dims
    mixers = sum(
        layer.mixer.flops_per_token(dims, layer.options, seq_length)
        for layer in architecture.layers
    )
    ffn = 6 * model.hidden_size * model.ffn_hidden_size
    return mixers + model.num_layers * ffn + 2 * model.vocab_size * model.hidden_size


def training_flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Forward and backward, recomputation not counted."""
    return 3 * forward_flops_per_token(architecture, seq_length)


def microbatch(config: Config, *, on_cpu: bool = False) -> Microbatch:
    """Return what one forward pass of a rank sees."""
    training, parallel = config.training, config.parallel
    return Microbatch(
        sequences=training.micro_batch_size,
        seq_length=training.seq_length,
        dims=architecture_of(config).dims,
        width=2 if training.precision == "bf16" else 4,
        tp=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        on_cpu=on_cpu,
        backend=training.scan_backend,
    )
