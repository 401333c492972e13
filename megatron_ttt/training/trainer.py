"""The training run: build, resume, loop, validate, save.

What a `Trainer` holds is what a step needs; everything that can be a function of it stands in the
modules beside this one.
"""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ttt import platform as platforms
from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.state import layout, load_checkpoint, load_weights
from megatron_ttt.checkpoint.store import (
    Checkpoint,
    check_architecture,
    checkpoint_name,
    find_newest,
    link_milestone,
    milestone_name,
    open_checkpoint,
    prune,
    remove_leftovers,
    write_pointer,
)
from megatron_ttt.checkpoint.writer import CheckpointWriter
from megatron_ttt.config import Config, check_layout, to_dict, to_yaml
from megatron_ttt.data.batches import data_files, open_data
from megatron_ttt.data.identity import check_unchanged, fingerprints
from megatron_ttt.errors import TrainingError, UserError
from megatron_ttt.hf.background import BackgroundExports
from megatron_ttt.model import build_chunks, core_config, initialise_weights, set_inner_lr_scale
from megatron_ttt.planning import peak_flops, training_flops_per_token
from megatron_ttt.training.health import SpikeWatch, differing_replicas, first_bad_place
from megatron_ttt.training.lost import Whereabouts
from megatron_ttt.training.metrics import MetricsLog, say
from megatron_ttt.training.optimizer import (
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    step_optimizer,
    wrap_chunks,
)
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate
from megatron_ttt.training.step import run_batches
from megatron_ttt.training.stopping import StopRequests

FINAL_MODEL = "final_model"
"""Folder of the finished model, as a Hugging Face directory, in the run folder."""

SLOW_SAVE_SECONDS = 10.0
"""A save that holds training up for less is not worth a warning."""


def start(config: Config) -> platforms.Platform:
    """Prepare this process: platform, process group, megatron's groups, seeds."""
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    platform = platforms.start(config.run.device, deterministic=config.training.deterministic)
    platforms.start_process_group(platform, config.run.timeout_minutes)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.run.timeout_minutes,
    )
    platforms.seed_everything(config.run.seed)
    return platform


class Trainer:
    """A run from its configuration to its last checkpoint.

    `step` counts the optimizer steps behind; `chunks` are the unwrapped model chunks of this rank.
    """

    def __init__(
        self,
        config: Config,
        platform: platforms.Platform,
        stop: StopRequests | None = None,
        at: Whereabouts | None = None,
    ):
        """stop: what can end the run early; None: nothing does. at: kept up to date."""
        self.config, self.platform, self.stop = config, platform, stop
        self.at = at or Whereabouts()
        self.run_dir = Path(config.run.dir)
        self.is_first_rank = dist.get_rank() == 0
        self.exports = BackgroundExports()
        # Everything a user can have got wrong is looked at before the slow building.
        self.resume_from = self._find_checkpoint()
        self.data = open_data(config)

        self.chunks = build_chunks(config, core_config(config, platform))
        for chunk in self.chunks:
            initialise_weights(chunk, config.model, config.run.seed)
        self.ddp_chunks = wrap_chunks(config, self.chunks)
        self.optimizer = build_optimizer(config, self.ddp_chunks)
        self.step = 0
        self.writer = CheckpointWriter(
            asynchronous=config.checkpoint.asynchronous, failed=self._save_failed
        )
        self.saved_at = time.perf_counter()
        self.skipped_steps = self.bad_steps_in_a_row = 0
        self.last_validation = -1, math.nan  # step, loss
        self.spike_watches = {name: SpikeWatch(name) for name in ("loss", "grad_norm")}
        if self.resume_from is not None:
            self._resume()

    def _find_checkpoint(self) -> Checkpoint | None:
        """What this run goes on from (see `checkpoint.load`), as rank 0 finds it. Collective."""
        found = [None]
        self.data_fingerprints = {}
        if self.is_first_rank:
            self.data_fingerprints = fingerprints(data_files(self.config))
            remove_leftovers(self.run_dir)
            found = [self._choose_checkpoint()]
        dist.broadcast_object_list(found)
        return found[0]

    def _choose_checkpoint(self) -> Checkpoint | None:
        load = self.config.checkpoint.load
        checkpoint = find_newest(self.run_dir, say)
        if load == "none" and checkpoint is not None:
            raise UserError(
                f"checkpoint.load=none, but {checkpoint.path} exists: set another run.dir, or "
                "checkpoint.load=auto to go on from it"
            )
        if load not in ("auto", "none"):
            named = open_checkpoint(load)
            if damage := find_damage(named.path):
                raise UserError(f"checkpoint.load={load} is damaged ({damage}): name another")
            rewound = named.path.resolve().parent == self.run_dir.resolve()
            if checkpoint is None or rewound:
                checkpoint = named
        if checkpoint is not None:
            check_architecture(checkpoint, to_dict(self.config)["model"])
            self._check_data_position(checkpoint)
            if checkpoint.path.resolve().parent == self.run_dir.resolve():
                check_unchanged(checkpoint.state.get("data", {}), self.data_fingerprints)
        return checkpoint

    def _check_data_position(self, checkpoint: Checkpoint) -> None:
        here = self.config.training.global_batch_size
        if checkpoint.step == 0:
            return
        there = checkpoint.config["training"]["global_batch_size"]
        if there != here:
            raise UserError(
                f"{checkpoint.path} was trained with training.global_batch_size={there}; going on "
                f"with {here} would repeat or skip data"
            )
        if checkpoint.step > self.config.training.steps:
            raise UserError(
                f"{checkpoint.path} is past training.steps={self.config.training.steps}: raise it"
            )

    def _resume(self) -> None:
        checkpoint = self.resume_from
        if checkpoint.state["has_optimizer"]:
            load_checkpoint(checkpoint, self.config, self.chunks, self.optimizer)
            self.step = checkpoint.step
            self.skipped_steps = checkpoint.state.get("skipped_steps", 0)
        else:
            load_weights(checkpoint, self.chunks)
            self.optimizer.reload_model_params()
        if self.is_first_rank:
            say(f"Resumed from {checkpoint.path} at step {self.step}")

    def train(self) -> str | None:
        """Run the remaining steps; save and validate at the end.

        Returns why the run stopped before that, in words; it has saved then. Raises TrainingError
        for a run that cannot go on.
        """
        config = self.config
        last = config.training.exit_step or config.training.steps
        log = self._open_log()
        if self.step >= last and self.is_first_rank:
            say(f"Nothing to do: step {self.step} of {last} is behind")
        batches = self.data.train_batches(self.step, last)
        self._mode(training=True)
        reason = None
        if self.stop is not None and self.step < last:
            # A signal during start-up: there is nothing new to save.
            reason = self.stop.reason(self.platform.device)
        while self.step < last and reason is None:
            self.at.step, self.at.doing = self.step + 1, "training"
            started = time.perf_counter()
            microbatches = next(batches)
            waited = time.perf_counter() - started
            figures = self.train_step(microbatches)
            figures["seconds"] = round(time.perf_counter() - started, 4)
            figures["data_wait"] = round(waited, 4)
            if log is not None:
                log.step(self.step, figures, self.platform.peak_memory_bytes())
            self._look_after(figures, microbatches)
            self.writer.poll()
            at_end = self.step == last
            if at_end or self._due(config.training.eval_every):
                self.validate(log)
            due = self._due(config.checkpoint.save_every) or self._milestone_due()
            reason = None if at_end else self._stop_reason()
            if at_end or due or reason is not None:
                if log is not None:
                    log.sync()
                self.save()
                if not at_end and reason is None:
                    reason = self._stop_reason()  # a signal during the save: that was the last
        self.writer.wait()
        if log is not None:
            log.close()
            if reason is not None and self.writer.failure is None:
                say(f"Stopped at step {self.step} of {last}: {reason}. The same command goes on")
        self._wait_for_exports()
        if self.writer.failure is not None:
            raise TrainingError(
                f"the last checkpoint, of step {self.step}, was not saved ({self.writer.failure}): "
                "make room, and give the same command again"
            )
        return reason

    def _stop_reason(self) -> str | None:
        if self.stop is None:
            return None
        return self.stop.reason(self.platform.device, self.config.training.exit_after_minutes)

    def _look_after(self, figures: dict[str, float], microbatches: list[torch.Tensor]) -> None:
        """Warn of spikes, compare replicas, and end a run whose numbers have gone wrong."""
        warnings = [watch.see(figures[name]) for name, watch in self.spike_watches.items()]
        if self.is_first_rank:
            for warning in filter(None, warnings):
                say(f"Warning at step {self.step}: {warning}")
        if self.bad_steps_in_a_row >= self.config.training.max_bad_steps:
            forward = partial(self._run, microbatches, forward_only=True)
            with torch.no_grad():
                place = first_bad_place(self.chunks, forward)
            raise TrainingError(
                f"{self.bad_steps_in_a_row} steps in a row were not finite, the last step "
                f"{self.step}; first not finite is {place}. Go back to an earlier checkpoint "
                "(checkpoint.load) with a lower optimizer.lr"
            )
        if self._due(self.config.training.check_replicas_every):
            gather_parameters(self.ddp_chunks)
            if differing := differing_replicas(self.chunks):
                raise TrainingError(
                    f"copies of {len(differing)} parameters differ between ranks at step "
                    f"{self.step}, {differing[0]} among them: some rank's memory or network is "
                    "faulty; resume from the last checkpoint on other machines"
                )

    def train_step(self, microbatches: list[torch.Tensor]) -> dict[str, float]:
        """One optimizer step on this rank's microbatches; returns what it measured."""
        step = self.step + 1
        scale = inner_lr_scale(self.config, step)
        rate = learning_rate(self.config, step)
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_inner_lr_scale(self.chunks, scale)
        loss = self._run(microbatches)
        set_learning_rate(self.optimizer, rate)
        grad_norm, stepped = step_optimizer(self.optimizer, loss)
        self.step = step
        self.bad_steps_in_a_row = 0 if stepped else self.bad_steps_in_a_row + 1
        self.skipped_steps += not stepped
        figures = {"loss": loss, "lr": rate, "grad_norm": grad_norm}
        if self.config.model.is_ttt:
            figures["ttt_lr_mult"] = scale
        if self.skipped_steps:
            figures["skipped_steps"] = self.skipped_steps
        return figures

    def _run(self, microbatches: list[torch.Tensor], *, forward_only: bool = False) -> float:
        """The loss of a global batch, of which these are this rank's microbatches."""
        masked_id, device = self.data.masked_id, self.platform.device
        return run_batches(
            self.ddp_chunks, microbatches, masked_id, device, forward_only=forward_only
        )

    @torch.no_grad()
    def validate(self, log: MetricsLog | None = None) -> float | None:
        """Mean loss over the validation sequences; None where there are none."""
        microbatches = self.data.validation_batches()
        if not microbatches:
            return None
        self.at.doing = "validating"
        self._mode(training=False)
        set_inner_lr_scale(self.chunks, 1.0)
        loss = self._run(microbatches, forward_only=True)
        self._mode(training=True)
        self.last_validation = self.step, loss
        if log is not None:
            log.validation(self.step, loss)
        return loss

    def save(self) -> None:
        """Write checkpoint-STEP/, a milestone where one is due, and drop the oldest."""
        self.at.doing = "saving"
        gather_parameters(self.ddp_chunks)
        path = self.run_dir / checkpoint_name(self.step)
        state = {
            "step": self.step,
            "layout": layout(self.config),
            "torch": torch.__version__,
            "config": to_dict(self.config),
            "skipped_steps": self.skipped_steps,
            "data": self.data_fingerprints,  # rank 0's, which writes this
        }
        validated_step, loss = self.last_validation
        if validated_step == self.step:
            state["val_loss"] = loss
        published = partial(self._after_save, path, self.step, self._milestone_due())
        trained = time.perf_counter() - self.saved_at
        stall = self.writer.save(path, self.chunks, self.optimizer, state, published)
        self.saved_at = time.perf_counter()
        if self.is_first_rank and self.config.checkpoint.asynchronous:
            say(f"Saving {path} in the background; training stood still for {stall:.2f}s")
        if self.is_first_rank and stall > max(SLOW_SAVE_SECONDS, trained):
            say(
                f"Warning: training stood still for {stall:.1f}s for a checkpoint, after "
                f"{trained:.1f}s of training: the disk is slow, or checkpoint.save_every small"
            )

    def _after_save(self, path: Path, step: int, milestone: bool, seconds: float) -> None:
        """What rank 0 does when a checkpoint has its name."""
        say(f"Saved {path} in {seconds:.1f}s")
        try:
            write_pointer(path)
            if milestone:
                link_milestone(path, step)
            prune(self.run_dir, self.config.checkpoint.keep)
        except OSError as error:
            say(f"Warning: {path} is good, but what follows a save failed: {error}")
        self._start_exports(path, step, milestone)

    def _save_failed(self, path: Path, why: str) -> None:
        """What all ranks do when a checkpoint could not be written."""
        if self.config.checkpoint.on_save_error == "stop":
            raise TrainingError(
                f"{path} was not saved ({why}), and checkpoint.on_save_error=stop: make room, and "
                "give the same command again"
            )
        if self.is_first_rank:
            say(
                f"Warning: {path} was not saved ({why}): training goes on until the next save; the "
                "checkpoints before are as they were"
            )

    def _start_exports(self, path: Path, step: int, milestone: bool) -> None:
        """Begin what is to be exported of a checkpoint that was just published."""
        options = self.config.checkpoint
        if milestone and options.export_milestones:
            folder = self.run_dir / milestone_name(step)
            self.exports.start(folder, self.run_dir / f"{folder.name}-hf")
        wanted = options.export_final
        if wanted is None:
            wanted = self.config.data.tokenizer_model is not None
        if wanted and step == self.config.training.steps:
            self.exports.start(path, self.run_dir / FINAL_MODEL)

    def _wait_for_exports(self) -> None:
        """Until rank 0's are done; the ranks keep in touch, as one that waits long gives up."""
        running = torch.ones((), dtype=torch.int32, device=self.platform.device)
        while True:
            running.fill_(int(not self.exports.finished()))
            dist.broadcast(running, src=0)
            if not running.item():
                break
            time.sleep(1.0)
        for line in self.exports.publish():
            say(line)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def _milestone_due(self) -> bool:
        return self._due(self.config.checkpoint.milestone_every)

    def _mode(self, *, training: bool) -> None:
        for chunk in self.ddp_chunks:
            chunk.train(training)

    def _open_log(self) -> MetricsLog | None:
        """Rank 0 writes the resolved configuration and opens the log; the others have none."""
        if not self.is_first_rank:
            return None
        config = self.config
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write to run.dir={self.run_dir}: {error.strerror}") from None
        peak = None
        if self.platform.kind == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
        return MetricsLog(
            config,
            first_step=self.step,
            tokens_per_step=config.training.global_batch_size * config.training.seq_length,
            flops_per_token=training_flops_per_token(config.model, config.training.seq_length),
            peak_flops=peak and peak * dist.get_world_size(),
        )
