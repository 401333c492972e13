"""What goes with a save: the pointer, milestones, pruning, exports, and warnings."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ttt.checkpoint.run_folder import (
    checkpoint_name,
    link_milestone,
    list_checkpoints,
    milestone_name,
    prune,
    write_pointer,
)
from megatron_ttt.checkpoint.writer import CheckpointWriter
from megatron_ttt.config import Config
from megatron_ttt.errors import TrainingError
from megatron_ttt.hf.background import BackgroundExports
from megatron_ttt.hf.export_manifest import is_export_of
from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.loggers import log_line
from megatron_ttt.training.optimizer_checks import save_checks
from megatron_ttt.training.resume import is_own
from megatron_ttt.training.stopping import StopRequests

if TYPE_CHECKING:
    from megatron_ttt.training.trainer import Trainer

FINAL_MODEL = "final_model"
"""Folder of the finished model, as a Hugging Face directory, in the run folder."""

EXPORT_POLL_SECONDS = 1.0

SLOW_SAVE_SECONDS = 10.0
"""A save that holds training up for less is not worth a warning."""


class Saver(Hook):
    """Checkpoints of a run into its folder. All its methods are collective."""

    def __init__(self, config: Config, device: torch.device, stop: StopRequests | None = None):
        """stop: asked before a save and when it is published whether the folder is still this
        run's; None: it is."""
        self.config, self.device, self.stop = config, device, stop
        self.run_dir = Path(config.run.dir)
        self.is_first_rank = dist.get_rank() == 0
        self.exports = BackgroundExports()
        self.writer = CheckpointWriter(
            asynchronous=config.checkpoint.asynchronous, failed=self._failed
        )
        self.removals: list[threading.Thread] = []
        self.saved_at = time.perf_counter()

    @property
    def failure(self) -> str | None:
        """Why the last checkpoint was not written; None if it was."""
        return self.writer.failure

    def on_train_start(self, trainer: Trainer) -> None:
        """Begin the exports that a run which ended before has left undone."""
        checkpoint = trainer.resume_from
        if self.is_first_rank and checkpoint is not None and is_own(checkpoint, self.run_dir):
            self._export_what_is_missing(checkpoint.path, trainer.step)

    def on_step_end(
        self, trainer: Trainer, figures: dict[str, float], microbatches: list[Tensor]
    ) -> None:
        """Publish what has been written and exported."""
        self.writer.poll()
        self._advance_exports()

    def wait(self) -> None:
        """Until all is written and published, and what goes for it is gone."""
        self.writer.wait()
        self._wait_for_removals()

    def save(
        self,
        chunks: list[nn.Module],
        optimizer,
        state: dict[str, Any],
        *,
        milestone: bool,
        since: float,
    ) -> None:
        """Write checkpoint-STEP/ of unwrapped chunks with current weights, and when it has its name
        what goes with it. state: see the writer. since: when training stopped for it, by
        time.perf_counter. Raises TrainingError where copies on other ranks differ."""
        self._check_alone()
        self._wait_for_removals()  # there may be no room but theirs
        path = self.run_dir / checkpoint_name(state["step"])
        published = partial(self._published, path, state["step"], milestone)
        checks = save_checks(chunks, optimizer, state["step"], self.device)

        def compare(seen: Any) -> dict[str, Any]:
            self._check_alone()
            return checks.compare(seen)

        self.writer.save(
            path,
            chunks,
            optimizer,
            state,
            checks=checks._replace(compare=compare),
            published=published,
        )
        stall, trained = time.perf_counter() - since, since - self.saved_at
        self.saved_at = time.perf_counter()
        if self.is_first_rank and self.config.checkpoint.asynchronous:
            log_line(f"Saving {path} in the background; training stood still for {stall:.2f}s")
        if self.is_first_rank and stall > max(SLOW_SAVE_SECONDS, trained):
            log_line(
                f"Warning: training stood still for {stall:.1f}s for a checkpoint, after "
                f"{trained:.1f}s of training: the disk is slow, or checkpoint.save_every small"
            )

    def _check_alone(self) -> None:
        if self.stop is not None:
            self.stop.check_alone()

    def _published(self, path: Path, step: int, milestone: bool, seconds: float) -> None:
        """What rank 0 does when a checkpoint has its name."""
        log_line(f"Saved {path} in {seconds:.1f}s")
        with self._warning(path):
            write_pointer(path)
        if milestone:
            with self._warning(path):
                link_milestone(path, step)
                self._export_milestone(self.run_dir / milestone_name(step))
        with self._warning(path):
            prune(self.run_dir, self.config.checkpoint.keep, self._remove_behind)
        self._export_final(path, step)

    @contextlib.contextmanager
    def _warning(self, path: Path) -> Iterator[None]:
        """Go on where what follows a save cannot be done."""
        try:
            yield
        except OSError as error:
            log_line(f"Warning: {path} is good, but what follows a save failed: {error}")

    def _remove_behind(self, path: Path) -> None:
        """Remove a folder while training goes on: gigabytes take a while. The process does not end
        before."""

        def remove():
            try:
                shutil.rmtree(path)
            except OSError as error:
                log_line(f"Warning: {path} could not be removed: {error}")

        thread = threading.Thread(target=remove)
        try:
            thread.start()
        except RuntimeError:  # no more threads
            remove()
        else:
            self.removals.append(thread)

    def _wait_for_removals(self) -> None:
        while self.removals:
            self.removals.pop().join()

    def _failed(self, path: Path, why: str) -> None:
        """What all ranks do when a checkpoint could not be written."""
        if self.config.checkpoint.on_save_error == "stop":
            raise TrainingError(
                f"{path} was not saved ({why}), and checkpoint.on_save_error=stop: make room, and "
                "give the same command again"
            )
        if self.is_first_rank:
            log_line(
                f"Warning: {path} was not saved ({why}): training goes on until the next save; the "
                "checkpoints before are as they were"
            )

    def _export_what_is_missing(self, path: Path, step: int) -> None:
        """On rank 0: the exports of a run that ended, at `step`, before they were done."""
        for listed in list_checkpoints(self.run_dir):
            of_milestone = listed.kind == "milestone"
            if of_milestone and not is_export_of(_export_of(listed.path), listed.path):
                self._export_milestone(listed.path)
        if not is_export_of(self.run_dir / FINAL_MODEL, path):
            self._export_final(path, step)

    def _export_milestone(self, path: Path) -> None:
        if self.config.checkpoint.export_milestones:
            self.exports.add(path, _export_of(path))

    def _export_final(self, path: Path, step: int) -> None:
        wanted = self.config.checkpoint.export_final
        if wanted is None:
            wanted = self.config.data.tokenizer_model is not None
        if wanted and step == self.config.training.steps:
            self.exports.add(path, self.run_dir / FINAL_MODEL)

    def _advance_exports(self) -> None:
        for line in self.exports.advance():
            log_line(line)

    def finish(
        self, step: int, reason: str | None, stop_reason: Callable[[], str | None]
    ) -> str | None:
        """Wait for the exports, but not where there is a `reason` to stop; return that, or one
        that comes up meanwhile. Raises TrainingError where the last checkpoint, of `step`, or an
        export failed."""
        if self.failure is None and reason is None:
            return self.wait_for_exports(stop_reason)
        self._abandon_exports()
        if self.failure is not None:
            raise TrainingError(
                f"the last checkpoint, of step {step}, was not saved ({self.failure}): "
                "make room, and give the same command again"
            )
        return reason

    def _abandon_exports(self) -> None:
        """Whoever stops a run gives it little time; the next one exports what is missing."""
        self.exports.abandon()
        self._advance_exports()

    def wait_for_exports(self, stop_reason: Callable[[], str | None]) -> str | None:
        """Until rank 0's are done, or abandoned as there is a reason to stop, which is returned;
        the ranks keep in touch, as one that waits long gives up. Raises TrainingError, on all of
        them, where one failed."""
        running = torch.ones((), dtype=torch.int32, device=self.device)
        while True:
            self._advance_exports()
            running.fill_(int(self.exports.busy))
            dist.broadcast(running, src=0)
            if not running.item():
                break
            if (reason := stop_reason()) is not None:
                self._abandon_exports()
                return reason
            time.sleep(EXPORT_POLL_SECONDS)
        failures = [self.exports.failures]
        dist.broadcast_object_list(failures)
        for output, why in failures[0].items():
            raise TrainingError(
                f"{output} was not exported: {why}. The checkpoints are good: the same command, "
                "given again, exports what is missing"
            )
        return None


def _export_of(milestone: Path) -> Path:
    return milestone.with_name(f"{milestone.name}-hf")
