"""What each rank writes, holds and sends in a save and a load; run it as a job.

    saving_shares.py OUTPUT key.path=value ...

Writes OUTPUT: for each rank the bytes it `wrote`, its `boxes`, and of `save` and `load` the memory
above what it held before (`held`), the largest tensor and all bytes it put into collectives
(`largest`, `sent`).
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from harness import ROOT
from torch.distributed import distributed_c10d

from megatron_ttt.checkpoint.reader import read_metadata
from megatron_ttt.checkpoint.run_folder import open_checkpoint
from megatron_ttt.checkpoint.state import load_checkpoint
from megatron_ttt.config import load_config
from megatron_ttt.process import prepare_process
from megatron_ttt.training.trainer import Trainer

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("send", "isend", "batch_isend_irecv"),
)


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors_of(part)] if isinstance(value, list) else []


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def measured(work: Callable[[], object]) -> dict[str, int]:
    """What this process holds at the most and sends while it works."""
    sizes = []

    def counting(original):
        def collective(*arguments, **options):
            given = [t for a in (*arguments, *options.values()) for t in tensors_of(a)]
            sizes.extend(t.numel() * t.element_size() for t in given)
            return original(*arguments, **options)

        return collective

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with (
        mock.patch.multiple(
            distributed_c10d,
            **{name: counting(getattr(distributed_c10d, name)) for name in COLLECTIVES},
        ),
        mock.patch.multiple(dist, **{name: counting(getattr(dist, name)) for name in COLLECTIVES}),
    ):
        work()
    held = memory("VmHWM") - before
    return {"held": held, "sent": sum(sizes), "largest": max(sizes, default=0)}


def main() -> None:
    output, *overrides = sys.argv[1:]
    config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], overrides)
    trainer = Trainer(config, prepare_process(config))
    trainer.save()  # what is imported and made once
    trainer.saver.wait()
    trainer.step = 1
    found = {"save": measured(trainer.save)}
    folder = trainer.run_dir / "checkpoint-1"
    checkpoint = open_checkpoint(folder)
    found["load"] = measured(
        lambda: load_checkpoint(checkpoint, config, trainer.chunks, trainer.optimizer)
    )
    own = f"__{dist.get_rank()}_"
    places = read_metadata(folder).storage_data.values()
    found["boxes"] = sum(place.relative_path.startswith(own) for place in places)
    found["wrote"] = sum(path.stat().st_size for path in folder.glob(f"{own}*"))
    found["parameters"] = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(everyones))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
