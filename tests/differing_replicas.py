"""Under torchrun, two ranks: a weight's copy is changed on one, and must be found."""

import sys

import torch.distributed as dist

from megatron_ttt.config import load_config
from megatron_ttt.model import build_chunks, initialise_weights, make_transformer_config
from megatron_ttt.process import prepare_process
from megatron_ttt.stack import architecture_of
from megatron_ttt.training.optimizer import build_optimizer, wrap_chunks
from megatron_ttt.training.optimizer_checks import compute_checksums, differing_weights

config = load_config(["yaml_recipes/debug_cpu.yaml"], sys.argv[1:])
platform = prepare_process(config)
chunks = build_chunks(config, make_transformer_config(config, platform))
for chunk in chunks:
    initialise_weights(chunk, architecture_of(config), seed=0)
optimizer = build_optimizer(config, wrap_chunks(config, chunks))


def found() -> list[str]:
    return differing_weights(compute_checksums(chunks, optimizer), platform.device)


before = found()
if dist.get_rank() == 1:
    chunks[0].decoder.final_layernorm.weight.data[3] += 1e-6
after = found()
if dist.get_rank() == 0:
    print(f"before {before}, after {after}")
dist.barrier()
dist.destroy_process_group()
