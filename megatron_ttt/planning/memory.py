"""What the fullest rank holds at its fullest moment (docs/planning.md, memory).

The lists of what is kept for the backward follow the code of `layers/` and `ops/` tensor by tensor;
`benchmarks/memory_estimate.py` holds their sum against a process that trains.

Sizes: D hidden size, I width of the SwiGLU, V vocabulary, f head_dim, K mini-batch, T tokens of a
microbatch; `w` bytes of a weight or activation, 2 in bf16; `cut` what of a tensor a rank has under
tensor parallelism, `rows` what of it it has under sequence parallelism.
"""

from __future__ import annotations

from megatron_ttt.config import Config
from megatron_ttt.planning.cost import GIB, parameters_of_rank

TORCH_GROUP = {"ttt_linear": 8, "ttt_mlp": 16}
"""Mini-batches between kept states in ops/linear.py and ops/mlp.py."""
TRITON_GROUP = CPP_GROUP = 16
"""The same in ops/triton/common.py and ops/cpp/scan.py."""
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
    training, parallel = config.training, config.parallel
    w = _width(config)
    parameters, fp32 = parameters_of_rank(config)
    main_copies = 4 * (parameters - fp32) if w == 2 else 0
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    parts = max(
        (
            _activations(config, stage, microbatches, parameters, on_cpu)
            for stage in _stages(parallel)
        ),
        key=lambda parts: sum(parts.values()),
    )
    parts = {
        "weights": w * (parameters - fp32) + 4 * fp32,
        "gradients": 4 * parameters,
        "optimizer": (8 * parameters + main_copies) / dp,
        **parts,
    }
    return {name: round(size / GIB, 3) for name, size in parts.items()}


def _stages(parallel) -> set[int]:
    """The first has most microbatches in flight, the last has the head."""
    return {0, parallel.pipeline_model_parallel_size - 1}


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
    chunk_layers = model.num_layers // (pp * chunks)
    in_flight = chunk_layers * _in_flight(pp, chunks, stage, microbatches)

    one_layer, states = kept_of_layer(config, on_cpu), kept_states(config, on_cpu)
    layer_input = w * rows * model.hidden_size
    backward = 4 * w * tokens * model.ffn_hidden_size / tp
    if training.recompute:
        kept = [(layer_input, in_flight)]
        backward += sum(one_layer) + states
        states = 0
    else:
        kept = [(block, in_flight) for block in one_layer]
    if pp > 1:
        kept.append((layer_input, in_flight / chunk_layers))  # what is sent on
    loss = []
    vocabulary = -(-model.vocab_size // tp)
    if stage == pp - 1:
        # The final norm keeps what any norm does, and the head its input.
        kept += [(2 * layer_input, 1), (4 * rows * model.hidden_size, 1)]
        # Logits, and in a bf16 model their float32 softmax, which becomes their gradient.
        loss = [w * tokens * vocabulary] + ([4 * tokens * vocabulary] if w == 2 else [])
    activations = sum(block * count for block, count in kept)
    inner_states = states * in_flight
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


def kept_of_layer(config: Config, on_cpu: bool) -> list[float]:
    """Bytes of each tensor that one layer keeps for its backward on a rank, but for the states. On
    a GPU convolutions and gate run in kernels that keep their inputs alone (ops/fused.py)."""
    model, training, parallel = config.model, config.training, config.parallel
    w, tp, D = _width(config), parallel.tensor_model_parallel_size, model.hidden_size
    tokens = training.micro_batch_size * training.seq_length
    whole = tokens * D
    rows = whole / (tp if parallel.sequence_parallel else 1)
    cut = whole / tp
    ffn = tokens * model.ffn_hidden_size / tp

    def norm():  # its input in float32, and what its weight multiplies
        return [4 * rows, w * rows]

    kept = [*norm(), *norm()]
    kept += [w * rows]  # into the SwiGLU
    kept += [w * 2 * ffn, w * ffn, w * ffn, w * ffn]  # fc1; silu; + 0; the product, into fc2
    kept += [w * 3 * cut]  # q, k, v or q, v, gate
    kept += [w * cut, w * cut]  # q and k, rotated
    if not model.is_ttt:
        kept += [w * rows, w * cut]  # into the projection; attention's output
        if training.micro_batch_size > 1:
            kept += [w * cut]  # made contiguous
        return kept
    kept += [w * whole]  # into the projection, gathered
    if w == 2:
        kept += [4 * whole]  # into the learning-rate gate
    kept += [w * cut, w * cut]  # into the post-norm, into the output projection
    if not model.is_mamba:
        return kept
    if on_cpu or parallel.sequence_parallel:
        kept += [*norm(), 4 * rows]  # pre-conv: its norm, the padded input
    else:
        kept += [w * rows]
    if on_cpu:
        kept += [4 * cut, 4 * cut]  # the padded inputs of conv_q and conv_k
        kept += [w * cut, w * cut]  # gelu of the gate, and what it multiplies
    return kept


def kept_states(config: Config, on_cpu: bool) -> float:
    """Bytes that one layer's scan keeps for its backward on a rank: inner states, inner outputs and
    hidden layers."""
    model, training = config.model, config.training
    if not model.is_ttt:
        return 0
    linear = model.layer == "ttt_linear"
    f, K = model.head_dim, model.mini_batch_size
    heads = training.micro_batch_size * model.num_heads
    heads /= config.parallel.tensor_model_parallel_size
    tokens = training.seq_length
    backend = training.scan_backend
    if on_cpu and backend in ("auto", "cpp"):
        E, P = 16 * -(-f // 16), 16 * -(-K // 16)
        token = 4 * 2 * E + (0 if linear else 4 * 8 * f * P / K)  # Z, Zbar; Z1, Z1bar
        state = (f + 1) * E if linear else (8 * f + 1) * E
        group = CPP_GROUP
    elif not on_cpu and backend in ("auto", "triton") and 16 <= f <= 128 and K in (16, 32, 64):
        w = _width(config)
        token = w * f if linear else w * 9 * f + 4 * (2 * f + K)  # G; X2, G1, G2, Z2, Zbar2, S2
        state = f * f + f if linear else 8 * f * f + 5 * f
        group = TRITON_GROUP
    else:
        padded = 8 * (f // 8 + 1)
        token = 4 * (2 * f + 4)  # Z, Zbar and their statistics
        token += 0 if linear else 4 * (8 * f + K)  # Z1, Z1bar, S2
        state = padded * f if linear else padded * 4 * f + 8 * (4 * f // 8 + 1) * f
        group = TORCH_GROUP[model.layer]
    return heads * (tokens * token + -(-tokens // (group * K)) * 4 * state)
