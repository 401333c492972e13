"""Bytes that a rank sends in one optimizer step, by kind of parallelism (docs/planning.md).

A ring over n ranks: gathering or scattering a tensor of b bytes sends b (n-1)/n from each rank, an
all-reduce twice that. Not counted: masks, losses, norms, and the pre-conv's halo of three tokens.
"""

from __future__ import annotations

from megatron_ttt.config import Config
from megatron_ttt.planning.cost import parameters_of_rank


def bytes_per_step(config: Config, dp: int) -> dict[str, float]:
    """Bytes that a rank in the middle sends: tensor, pipeline and data parallelism, and the whole.

    dp: the data-parallel size.
    """
    training, parallel, model = config.training, config.parallel, config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    w = 2 if training.precision == "bf16" else 4
    tokens = training.micro_batch_size * training.seq_length
    hidden = w * tokens * model.hidden_size
    parameters, _ = parameters_of_rank(config)
    vocabulary = -(-model.vocab_size // tp)

    tensor = _tensor(config, hidden, tokens) * microbatches
    shared = hidden / (tp if parallel.sequence_parallel else 1)
    pipeline = 2 * shared * chunks * microbatches if pp > 1 else 0
    if pp > 1:  # the two copies of the embedding add up their gradients
        pipeline += 4 * model.hidden_size * vocabulary
    data = (4 + w) * parameters * (dp - 1) / dp
    sent = {"tensor": tensor, "pipeline": pipeline, "data": data}
    return {**sent, "total": sum(sent.values())}


def _tensor(config: Config, hidden: float, tokens: int) -> float:
    """Of one microbatch. An all-reduce counts as a reduce-scatter and a gather."""
    parallel, model = config.parallel, config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    share = (tp - 1) / tp
    # Mixer and SwiGLU, forward and backward: two all-reduces, or a gather and a scatter, each way.
    passes = 2 * 2 * 2
    if parallel.sequence_parallel:
        # megatron-core keeps the cut input of a column-parallel projection and gathers it again for
        # the weights' gradient; the TTT mixer keeps the gathered one.
        passes += 1 if model.is_ttt else 2
    layer = passes * hidden
    if model.is_ttt:
        # The post-norm: two float32 numbers a token gathered, two all-reduced.
        layer += 4 * 2 * tokens * (tp + 2)
    # Embedding forward, head backward.
    ends = 4 * hidden + (hidden if parallel.sequence_parallel else 0)
    return share * (model.num_layers / pp * layer + ends)
