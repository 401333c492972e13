"""What the fullest rank holds at its fullest moment (docs/planning.md, memory).

The lists of what is saved for the backward pass follow the code tensor by tensor, the mixers' in
`mixers/`; `benchmarks/memory_estimate.py` holds their sum against a process that trains.

`w` is the bytes of a weight or activation, 2 in bf16; `rows` the tokens of a microbatch that a rank
has under sequence parallelism.
"""

from __future__ import annotations

from collections import Counter

from megatron_ttt.config import Config
from megatron_ttt.mixers.base import Microbatch
from megatron_ttt.planning.cost import GIB, layers_of_stage, microbatch, parameters_of_rank
from megatron_ttt.stack import Layer, architecture_of

MAPPED = 32 * 2**20
"""glibc takes larger blocks from the system and gives them back when they are freed; smaller ones
stay with the process (mallopt(3), M_MMAP_THRESHOLD)."""
HEAP_SLACK = 0.4
"""What glibc's heap has over the kept blocks in it. PyTorch asks for aligned blocks, which seldom
fit where one of the same size was freed. Measured between 0.3 and 0.5 (docs/planning.md)."""
LIBRARIES = 10 * 2**20
"""Libraries' caches after the first step on the CPU, without their code."""


def memory_per_rank(config: Config, dp: int, *, on_cpu: bool) -> dict[str, float]:
    """GiB of the fullest rank, by what they are for; their sum is the peak.

    dp: the data-parallel size. on_cpu: resident memory of a process on the CPU, else what PyTorch
    has allocated on a GPU. Saving a checkpoint comes on top of it.
    """
    training = config.training
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    stages = range(config.parallel.pipeline_model_parallel_size)
    parts = max(
        (_parts(config, stage, microbatches, dp, on_cpu) for stage in stages),
        key=lambda parts: sum(parts.values()),
    )
    return {name: round(size / GIB, 3) for name, size in parts.items()}


def _parts(
    config: Config, stage: int, microbatches: int, dp: int, on_cpu: bool
) -> dict[str, float]:
    """Bytes of a rank of a pipeline stage."""
    w = _width(config)
    parameters, fp32 = parameters_of_rank(config, stage)
    main_copies = 4 * (parameters - fp32) if w == 2 else 0
    return {
        "weights": w * (parameters - fp32) + 4 * fp32,
        "gradients": 4 * parameters,
        "optimizer": (8 * parameters + main_copies) / dp,
        **_activations(config, stage, microbatches, parameters, on_cpu),
    }


def _width(config: Config) -> int:
    return 2 if config.training.precision == "bf16" else 4


def _activations(
    config: Config, stage: int, microbatches: int, parameters: int, on_cpu: bool
) -> dict[str, float]:
    """Bytes that come and go in a step on a rank of a pipeline stage."""
    model, training, parallel = config.model, config.training, config.parallel
    w, pp = _width(config), parallel.pipeline_model_parallel_size
    tokens = training.micro_batch_size * training.seq_length
    tp = parallel.tensor_model_parallel_size
    rows = tokens / (tp if parallel.sequence_parallel else 1)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    chunks_in_flight = _in_flight(pp, chunks, stage, microbatches)

    batch, kinds = microbatch(config, on_cpu=on_cpu), architecture_of(config).kinds
    layer_input = w * rows * model.hidden_size
    backward, inner_states, kept = 0.0, 0.0, []
    for kind, number in Counter(layers_of_stage(config, stage)).items():
        layer = kinds[kind]
        saved = saved_by_layer(config, layer, batch)
        states = layer.mixer.saved_state_bytes(layer.options, batch)
        in_flight = number / chunks * chunks_in_flight
        if training.recompute:
            kept.append((layer_input, in_flight))
            backward = max(backward, sum(saved) + states)
        else:
            kept += [(block, in_flight) for block in saved]
            inner_states += states * in_flight
    backward += 4 * w * tokens * model.ffn_hidden_size / tp
    if pp > 1:
        kept.append((layer_input, chunks_in_flight))  # what is sent on
    loss = []
    vocabulary = -(-model.vocab_size // tp)
    if stage == pp - 1:
        # The final norm keeps what any norm does, and the head its input.
        kept += [(2 * layer_input, 1), (4 * rows * model.hidden_size, 1)]
        # Logits, and in a bf16 model their float32 softmax, which becomes their gradient.
        loss = [w * tokens * vocabulary] + ([4 * tokens * vocabulary] if w == 2 else [])
    activations = sum(block * count for block, count in kept)
    if not on_cpu:
        return {
            "activations": activations,
            "inner_states": inner_states,
            "temporaries": max(sum(loss), backward),
        }

    # At the end of the backward pass Gloo's reduce-scatter has copied the gradients, and the
    # embedding's gradient is there. Of all before only what is in the heap still counts.
    embedding = w * model.hidden_size * vocabulary
    end = sum(block for block in (4 * parameters, embedding) if block > MAPPED)
    heap = inner_states + sum(block * count for block, count in kept if block <= MAPPED)
    mapped = activations + inner_states - heap
    freed = max(sum(block for block in loss if block <= MAPPED), backward)
    if embedding <= MAPPED:  # larger than any hole: the head's gradient, then the embedding's own
        freed += embedding * (2 if pp == 1 else 1)
    mapped_loss = sum(block for block in loss if block > MAPPED)
    return {
        "activations": activations,
        "inner_states": inner_states,
        "temporaries": freed + max(mapped_loss, end - mapped),
        "allocator": HEAP_SLACK * heap + LIBRARIES,
    }


def _in_flight(pp: int, chunks: int, stage: int, microbatches: int) -> int:
    """Chunks' forward passes that wait for their backward, as megatron-core's schedules warm up."""
    if chunks == 1:
        return min(pp - stage, microbatches)
    return min((pp - stage - 1) * 2 + (chunks - 1) * pp + 1, microbatches * chunks)


def saved_by_layer(config: Config, layer: Layer, batch: Microbatch) -> list[float]:
    """Bytes of each tensor that one layer saves for its backward pass on a rank, but for the
    states."""
    w, ffn = batch.width, batch.tokens * config.model.ffn_hidden_size / batch.tp
    return [
        *batch.saved_by_norm(),
        *batch.saved_by_norm(),
        w * batch.rows,  # into the SwiGLU
        *(w * 2 * ffn, w * ffn, w * ffn, w * ffn),  # fc1; silu; + 0; the product, into fc2
        *layer.mixer.saved_bytes(layer.options, batch),
    ]
