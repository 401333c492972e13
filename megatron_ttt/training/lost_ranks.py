"""When another process has died or hangs: who is lost, said by a rank that waited in vain."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_ttt.errors import LostRankError
from megatron_ttt.training.hooks import Hook

if TYPE_CHECKING:
    from megatron_ttt.training.trainer import Trainer

ROLL_CALL_SECONDS = 5.0
"""The ranks that wait in vain give up at about the same time: so long until one counts as lost."""

_SIGNS = ("gloo", "timed out", "timeout", "connection closed", "connection reset", "broken pipe")


@dataclass
class Progress(Hook):
    """What this process is doing, and at which step."""

    step: int = 0
    doing: str = "starting up"

    def on_step_start(self, trainer: Trainer) -> None:
        self.step, self.doing = trainer.step + 1, "training"

    def on_validation_start(self, trainer: Trainer) -> None:
        self.doing = "validating"

    def on_save_start(self, trainer: Trainer) -> None:
        self.doing = "saving"

    def on_train_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is None:
            self.doing = "exporting"


@contextlib.contextmanager
def naming_lost_ranks(progress: Progress) -> Iterator[None]:
    """Turn a collective's failure into a LostRankError that names this rank, its step, what it was
    doing and the ranks that do not answer."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        lost = _roll_call()
        who = f"no answer from rank {', '.join(map(str, lost))}" if lost else "no answer"
        raise LostRankError(
            f"rank {os.environ.get('RANK', '0')} at step {progress.step}, {progress.doing}: {who} "
            f"({_reason(error)}). Give the same command again: it goes on from the "
            "last checkpoint"
        ) from error


def _reason(error: RuntimeError) -> str:
    """The first line of an error, without the place in the library's source."""
    return re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS)


def _roll_call() -> list[int]:
    """The ranks that have not come here too, by the launcher's store, which needs none of them."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"waited in vain/{dist.get_rank()}", "")
        missing = set(range(dist.get_world_size()))
        end = time.monotonic() + ROLL_CALL_SECONDS
        while missing and time.monotonic() < end:
            missing = {rank for rank in missing if not store.check([f"waited in vain/{rank}"])}
            time.sleep(0.1)
    except (RuntimeError, ValueError):  # the store itself is lost, or was not there yet
        return []
    return sorted(missing)
