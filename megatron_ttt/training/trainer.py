"""The training run: build, resume, loop, validate, save.

What a `Trainer` holds is what a step needs; everything that can be a function of it stands in the
modules beside this one.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ttt import platform as platforms
from megatron_ttt.checkpoint.state import layout, load_checkpoint, load_weights, save_checkpoint
from megatron_ttt.checkpoint.store import (
    Checkpoint,
    check_architecture,
    checkpoint_name,
    find_newest,
    link_milestone,
    milestone_name,
    open_checkpoint,
    prune,
)
from megatron_ttt.config import Config, check_layout, to_dict, to_yaml
from megatron_ttt.data.batches import open_data
from megatron_ttt.errors import UserError
from megatron_ttt.hf.background import BackgroundExports
from megatron_ttt.model import build_chunks, core_config, initialise_weights, set_inner_lr_scale
from megatron_ttt.planning import peak_flops, training_flops_per_token
from megatron_ttt.training.metrics import MetricsLog, say
from megatron_ttt.training.optimizer import (
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    wrap_chunks,
)
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate
from megatron_ttt.training.step import run_batches

FINAL_MODEL = "final_model"
"""Folder of the finished model, as a Hugging Face directory, in the run folder."""


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
    )
    platforms.seed_everything(config.run.seed)
    return platform


class Trainer:
    """A run from its configuration to its last checkpoint.

    `step` counts the optimizer steps behind; `chunks` are the unwrapped model chunks of this rank.
    """

    def __init__(self, config: Config, platform: platforms.Platform):
        self.config, self.platform = config, platform
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
        if self.resume_from is not None:
            self._resume()

    def _find_checkpoint(self) -> Checkpoint | None:
        """What this run goes on from: see `checkpoint.load`."""
        load = self.config.checkpoint.load
        checkpoint = find_newest(self.run_dir)
        if load == "none" and checkpoint is not None:
            raise UserError(
                f"checkpoint.load=none, but {checkpoint.path} exists: set another run.dir, or "
                "checkpoint.load=auto to go on from it"
            )
        if load not in ("auto", "none"):
            named = open_checkpoint(load)
            rewound = named.path.resolve().parent == self.run_dir.resolve()
            if checkpoint is None or rewound:
                checkpoint = named
        if checkpoint is not None:
            check_architecture(checkpoint, to_dict(self.config)["model"])
            self._check_data_position(checkpoint)
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
        else:
            load_weights(checkpoint, self.chunks)
            self.optimizer.reload_model_params()
        if self.is_first_rank:
            say(f"Resumed from {checkpoint.path} at step {self.step}")

    def train(self) -> None:
        """Run the remaining steps; save and validate at the end."""
        config = self.config
        last = config.training.exit_step or config.training.steps
        log = self._open_log()
        if self.step >= last and self.is_first_rank:
            say(f"Nothing to do: step {self.step} of {last} is behind")
        batches = self.data.train_batches(self.step, last)
        self._mode(training=True)
        while self.step < last:
            started = time.perf_counter()
            microbatches = next(batches)
            waited = time.perf_counter() - started
            figures = self.train_step(microbatches)
            figures["seconds"] = round(time.perf_counter() - started, 4)
            figures["data_wait"] = round(waited, 4)
            if log is not None:
                log.step(self.step, figures, self.platform.peak_memory_bytes())
            if not math.isfinite(figures["loss"]):
                raise RuntimeError(f"the loss of step {self.step} is {figures['loss']}")
            at_end = self.step == last
            if at_end or self._due(config.training.eval_every):
                self.validate(log)
            if at_end or self._due(config.checkpoint.save_every) or self._milestone_due():
                self.save()
        if log is not None:
            log.close()
        self._wait_for_exports()

    def train_step(self, microbatches: list[torch.Tensor]) -> dict[str, float]:
        """One optimizer step on this rank's microbatches; returns what it measured."""
        step = self.step + 1
        scale = inner_lr_scale(self.config, step)
        rate = learning_rate(self.config, step)
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_inner_lr_scale(self.chunks, scale)
        loss = run_batches(self.ddp_chunks, microbatches, self.data.masked_id, self.platform.device)
        set_learning_rate(self.optimizer, rate)
        _, grad_norm, _ = self.optimizer.step()
        self.step = step
        figures = {"loss": loss, "lr": rate, "grad_norm": float(grad_norm)}
        if self.config.model.is_ttt:
            figures["ttt_lr_mult"] = scale
        return figures

    @torch.no_grad()
    def validate(self, log: MetricsLog | None = None) -> float | None:
        """Mean loss over the validation sequences; None where there are none."""
        microbatches = self.data.validation_batches()
        if not microbatches:
            return None
        self._mode(training=False)
        set_inner_lr_scale(self.chunks, 1.0)
        loss = run_batches(
            self.ddp_chunks,
            microbatches,
            self.data.masked_id,
            self.platform.device,
            forward_only=True,
        )
        self._mode(training=True)
        if log is not None:
            log.validation(self.step, loss)
        return loss

    def save(self) -> None:
        """Write checkpoint-STEP/, a milestone where one is due, and drop the oldest."""
        gather_parameters(self.ddp_chunks)
        path = self.run_dir / checkpoint_name(self.step)
        started = time.perf_counter()
        state = {
            "step": self.step,
            "layout": layout(self.config),
            "torch": torch.__version__,
            "config": to_dict(self.config),
        }
        save_checkpoint(path, self.chunks, self.optimizer, state)
        if not self.is_first_rank:
            return
        options = self.config.checkpoint
        if self._milestone_due():
            link_milestone(path, self.step)
            if options.export_milestones:
                milestone = self.run_dir / milestone_name(self.step)
                self.exports.start(milestone, self.run_dir / f"{milestone.name}-hf")
        prune(self.run_dir, options.keep)
        say(f"Saved {path} in {time.perf_counter() - started:.1f}s")
        wanted = options.export_final
        if wanted is None:
            wanted = self.config.data.tokenizer_model is not None
        if wanted and self.step == self.config.training.steps:
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
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(to_yaml(config))
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
