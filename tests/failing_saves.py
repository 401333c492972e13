"""Two data-parallel ranks, of which one fails at each moment of a save; run it under torchrun.

    failing_saves.py OUTPUT key.path=value ...

Writes to OUTPUT what was said of each save, by moment.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from harness import ROOT

from megatron_ttt.checkpoint import writer
from megatron_ttt.config import load_config
from megatron_ttt.platform.mcore_workarounds import saving
from megatron_ttt.process import prepare_process
from megatron_ttt.training.trainer import Trainer

MOMENTS = {
    "the tree": (writer, "checkpoint_tree", 1),
    "the folder, which is gone": (writer.dist_checkpointing, "save", 0),
    "objects in bytes": (saving, "mcore_to_pyt_state_dict", 1),
    "the plan": (saving.MCoreSavePlanner, "create_local_plan", 1),
    "copies to write": (saving._Writer, "prepare_write_data", 1),
    "the fork": (writer, "_fork", 1),
    "the checks": (writer, "_write_and_describe", 1),
    "the tensors' files": (saving, "_write_files", 1),
    "what was written": (saving._Writer.__base__, "retrieve_write_results", 1),
    ".metadata": (saving._Writer.__base__, "finish", 0),
    "publishing": (writer, "publish", 0),
}


@contextlib.contextmanager
def failing(owner, name: str, rank: int) -> Iterator[None]:
    """While a function fails on a rank."""
    if dist.get_rank() != rank:
        yield
        return
    with mock.patch.object(owner, name, side_effect=MemoryError("no more")):
        yield


def main() -> None:
    output, *overrides = sys.argv[1:]
    config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], overrides)
    trainer = Trainer(config, prepare_process(config))
    batches = trainer.data.train_batches(0, config.training.steps)
    trainer.train_step(next(batches))
    said = {}
    trainer.save()
    trainer.saver.wait()
    trainer.train_step(next(batches))
    for moment, (owner, name, rank) in MOMENTS.items():
        with failing(owner, name, rank):
            trainer.save()
            trainer.saver.wait()
        everyones = [None, None]
        dist.all_gather_object(everyones, trainer.saver.failure)
        assert everyones[0] == everyones[1], everyones
        said[moment] = everyones[0]
    trainer.save()
    trainer.saver.wait()
    said["at last"] = trainer.saver.failure
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
