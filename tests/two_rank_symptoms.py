"""What megatron-core's own objects do on two data-parallel ranks; run it under torchrun.

    two_rank_symptoms.py FOLDER

Writes to FOLDER/RANK.json what the rank saw:
- `elements`: of the optimizer's state, how many elements the rank would save, and how many there
  are on all ranks together;
- `planning`: what became of it while the other rank failed to plan a save (rank 0);
- `finishing`: what became of it while rank 0 failed to finish one (rank 1).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint import CheckpointException

from megatron_ttt import platform as platforms
from megatron_ttt.platform.mcore_workarounds.saving import use_results_file

WAIT = timedelta(seconds=3)
"""How long a rank waits for another: long enough for what takes milliseconds."""


def elements_saved(platform) -> tuple[int, int]:
    """(of this rank, of all together), after one step of an optimizer of two parameters."""
    from mcore_objects import own_optimizer

    optimizer, module = own_optimizer(platform)
    optimizer.step()
    model = {
        name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, 0, dist.get_rank()))
        for name, parameter in module.named_parameters()
    }
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    inner = optimizer.chained_optimizers[0]
    state = inner.sharded_param_state_fully_reshardable(model, metadata=metadata)
    saved = sum(entry.data.numel() for entry in nested_values(state))
    return saved, 3 * sum(parameter.numel() for parameter in module.parameters())


def own_planner() -> MCoreSavePlanner:
    """The planner of megatron-core's strategy, with its options."""
    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)


def outcome_of(call: Callable[[], object]) -> str:
    """What a call ends with, in words."""
    try:
        call()
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def while_rank_1_cannot_plan(folder: Path) -> str:
    """What a plan for a save ends with."""
    writer, planner = FileSystemWriterAsync(str(folder)), own_planner()
    group = dist.new_group(timeout=WAIT)

    def plan():
        save_state_dict_async_plan({"x": torch.ones(4)}, writer, group, planner=planner)

    if dist.get_rank() == 0:
        return outcome_of(plan)
    error = MemoryError("no more")
    with mock.patch.object(planner, "create_local_plan", side_effect=error):
        return outcome_of(plan)


def while_rank_0_cannot_finish(folder: Path) -> str:
    """What the end of a save, whose folder is gone, ends with."""
    use_results_file()
    writer = FileSystemWriterAsync(str(folder))
    group = dist.new_group(timeout=WAIT)
    tensors = {f"x{dist.get_rank()}": torch.ones(4)}
    planned, *_ = save_state_dict_async_plan(tensors, writer, group, planner=own_planner())
    written = {number: [] for number in range(len(writer.write_buckets))}
    writer.results_queue.put(written)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return outcome_of(lambda: save_state_dict_async_finalize(*planned))


def main() -> None:
    """Look, and write what was seen."""
    folder = Path(sys.argv[1])
    platform = platforms.start("cpu")
    platforms.start_process_group(platform)
    parallel_state.initialize_model_parallel()
    platforms.seed_everything(0)
    seen = {"elements": elements_saved(platform)}
    seen["planning"] = while_rank_1_cannot_plan(folder / "planned")
    dist.barrier()
    seen["finishing"] = while_rank_0_cannot_finish(folder / "finished")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
