"""Worker of test_planning.py: the bytes that rank 0 really sends in one step, by kind.

torchrun ... sent_bytes.py OUTPUT RECIPE [key.path=value ...]
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist

SENT = Counter()


def size(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def kind_of(group) -> str:
    """By its ranks: megatron-core has several groups of the same."""
    from megatron.core import parallel_state

    ranks = dist.get_process_group_ranks(group)
    if ranks == dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()):
        return "tensor"
    data = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
    return "data" if ranks == data else "pipeline"


def watch(name: str, whole, times: int) -> None:
    """Count the ring collective torch.distributed.`name`; whole(arguments, options) is the tensor
    of all ranks together."""
    original = getattr(dist, name)

    def watched(*arguments, **options):
        group = options.get("group") or next(
            (a for a in arguments if isinstance(a, dist.ProcessGroup)), None
        )
        ranks = dist.get_world_size(group)
        if ranks > 1:
            share = (ranks - 1) / ranks
            SENT[kind_of(group)] += times * share * size(whole(arguments, options))
        return original(*arguments, **options)

    setattr(dist, name, watched)


def watch_everything() -> None:
    """Before megatron-core is imported: it binds some of these names."""

    def first(arguments, options):
        return arguments[0] if arguments else next(iter(options.values()))

    def second(arguments, options):
        return arguments[1] if len(arguments) > 1 else options["input"]

    watch("all_reduce", first, 2)
    watch("all_gather_into_tensor", first, 1)
    watch("reduce_scatter_tensor", second, 1)
    batched = dist.batch_isend_irecv

    def watched_batch(operations):
        sends = [operation.tensor for operation in operations if operation.op is dist.isend]
        SENT["pipeline"] += sum(map(size, sends))
        return batched(operations)

    dist.batch_isend_irecv = watched_batch


def main() -> None:
    from megatron_ttt.config import load_config
    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.trainer import Trainer

    output, recipe, *overrides = sys.argv[1:]
    config = load_config([recipe], overrides)
    trainer = Trainer(config, prepare_process(config))
    training = config.training
    microbatches = training.global_batch_size // (
        training.micro_batch_size * dist.get_world_size() // config.parallel.model_parallel_size
    )
    shape = training.micro_batch_size, training.seq_length + 1
    ids = [torch.randint(2, config.model.vocab_size, shape) for _ in range(microbatches)]
    trainer.train_step(ids)
    SENT.clear()
    trainer.train_step(ids)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(SENT, file)
    dist.barrier()


if __name__ == "__main__":
    watch_everything()
    main()
