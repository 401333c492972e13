"""Whether a checkpoint is still what was written, as all ranks find out together."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.run_folder import Checkpoint, open_whole_checkpoint


def damage_found_together(folder: Path) -> str | None:
    """As `find_damage`; each rank reads its share of the files before it hears of the others.

    Collective; all ranks get the same.
    """
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(folder, dist.get_rank(), len(found)))
    return next(filter(None, found), None)


def open_whole_together(path: str | Path) -> Checkpoint:
    """As `open_whole_checkpoint`, collective."""
    return open_whole_checkpoint(path, damage_found_together)
