"""Bytes that a rank sends in one optimizer step, by kind of parallelism (docs/planning.md).

A ring over n ranks: gathering or scattering a tensor of b bytes sends b (n-1)/n from each rank, an
all-reduce twice that. Not counted: masks, losses, norms, and the pre-conv's halo of three tokens.
"""

from __future__ import annotations

from megatron_ttt.config import Config
from megatron_ttt.planning.cost import microbatch, parameters_of_rank
from megatron_ttt.stack import architecture_of


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

    tensor = _tensor(config, hidden) * microbatches
    shared = hidden / (tp if parallel.sequence_parallel else 1)
    pipeline = 2 * shared * chunks * microbatches if pp > 1 else 0
    if (
        pp > 1 and model.tie_word_embeddings
    ):  # the two copies of the embedding add up their gradients
        pipeline += 4 * model.hidden_size * vocabulary
    data = (4 + w) * parameters * (dp - 1) / dp
    sent = {"tensor": tensor, "pipeline": pipeline, "data": data}
    return {**sent, "total": sum(sent.values())}


def _tensor(config: Config, hidden: float) -> float:
    """Of one microbatch. An all-reduce counts as a reduce-scatter and a gather."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    share = (tp - 1) / tp
    # The SwiGLU, forward and backward: an all-reduce, or a gather and a scatter, each way. Under
    # sequence parallelism megatron-core keeps the cut input of a column-parallel projection and
    # gathers it again for the weights' gradient.
    layer = (5 if parallel.sequence_parallel else 4) * hidden
    layers, batch = architecture_of(config).layers, microbatch(config)
    mixers = sum(one.mixer.sent_bytes(one.options, batch) for one in layers)
    # Embedding forward, head backward.
    ends = 4 * hidden + (hidden if parallel.sequence_parallel else 0)
    return share * ((len(layers) * layer + mixers) / pp + ends)
