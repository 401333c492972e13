"""Under torchrun, two ranks: a step, a bit flipped, a save, what it says and what is there then.

    corrupted_optimizer.py WHAT key.path=value ...

WHAT, of the final norm: `main`, its main parameter, on the data-parallel rank that has it;
`moment`, one of its moments, on one of two tensor-parallel ranks that have it both; or `none`.
"""

import sys

import torch
import torch.distributed as dist

from megatron_ttt.config import load_config
from megatron_ttt.errors import TrainingError
from megatron_ttt.process import prepare_process
from megatron_ttt.training.optimizer import gather_parameters
from megatron_ttt.training.optimizer_checks import shards
from megatron_ttt.training.trainer import Trainer

what, *overrides = sys.argv[1:]
config = load_config(["yaml_recipes/debug_cpu.yaml"], overrides)
trainer = Trainer(config, prepare_process(config))
trainer.train_step(next(trainer.data.train_batches(0, 1)))
gather_parameters(trainer.ddp_chunks)
held = {name: shard for name, _, shard in shards(trainer.chunks, trainer.optimizer)}
shard = held.get("decoder.final_layernorm.weight")
if what == "main" and shard is not None and len(shard.weight) > 5:
    shard.state["param"].view(torch.int32)[5] ^= 1 << 20
if what == "moment" and dist.get_rank() == 1:
    shard.state["exp_avg_sq"].view(torch.int32)[5] ^= 1 << 3
said = "nothing"
try:
    trainer.save()
    trainer.saver.wait()
except TrainingError as error:
    said = str(error)
everyones = [None] * dist.get_world_size()
dist.all_gather_object(everyones, said)
if dist.get_rank() == 0:
    assert len(set(everyones)) == 1, everyones
    print(f"said: {said}; saved: {sorted(path.name for path in trainer.run_dir.glob('*'))}")
dist.barrier()
dist.destroy_process_group()
