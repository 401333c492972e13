"""Worker of test_planning.py: the bytes that rank 0 really sends in one step, by kind.

torchrun ... sent_bytes.py OUTPUT RECIPE [key.path=value ...]
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist

from megatron_ttt.config import load_config
from megatron_ttt.training.trainer import Trainer, start


def main() -> None:
    output, recipe, *overrides = sys.argv[1:]
    config = load_config([recipe], overrides)
    platform = start(config)
    trainer = Trainer(config, platform)
    training = config.training
    microbatches = training.global_batch_size // (
        training.micro_batch_size * dist.get_world_size() // config.parallel.model_parallel_size
    )
    shape = training.micro_batch_size, training.seq_length + 1
    ids = [torch.randint(2, config.model.vocab_size, shape) for _ in range(microbatches)]
    trainer.train_step(ids)
    sent = count_from_now_on()
    trainer.train_step(ids)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(sent, file)
    dist.barrier()


def count_from_now_on() -> Counter:
    """Watch torch.distributed: ring collectives and sends of this rank, bytes by kind."""
    from megatron.core import parallel_state

    kinds = {
        parallel_state.get_tensor_model_parallel_group(): "tensor",
        parallel_state.get_data_parallel_group(): "data",
    }
    sent = Counter()

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    def watch(name, tensor_of, times):
        original = getattr(dist, name)

        def watched(*arguments, **options):
            group = options.get("group") or next(
                (a for a in arguments if isinstance(a, dist.ProcessGroup)), None
            )
            ranks = dist.get_world_size(group)
            share = (ranks - 1) / ranks if ranks > 1 else 0
            sent[kinds.get(group, "pipeline")] += times * share * size(tensor_of(arguments, options))
            return original(*arguments, **options)

        setattr(dist, name, watched)

    def first(arguments, options):
        return arguments[0] if arguments else next(iter(options.values()))

    watch("all_reduce", first, 2)
    watch("all_gather_into_tensor", first, 1)
    watch("_all_gather_base", first, 1)
    watch("reduce_scatter_tensor", lambda a, o: a[1] if len(a) > 1 else o["input"], 1)
    watch("_reduce_scatter_base", lambda a, o: a[1] if len(a) > 1 else o["input"], 1)
    batched = dist.batch_isend_irecv

    def watched_batch(operations):
        for operation in operations:
            if operation.op is dist.isend:
                sent["pipeline"] += size(operation.tensor)
        return batched(operations)

    dist.batch_isend_irecv = watched_batch
    return sent


if __name__ == "__main__":
    main()
