"""Ten steps of a recipe and a resume of the last five, with the commands of a real run.

The model keeps its width, heads, vocabulary, precision and layout. Where memory asks for it (on the
CPU always) it has fewer layers and shorter sequences, and the report says so.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_ttt.config import Config, check_layout, to_dict
from megatron_ttt.data.indexed import bin_path
from megatron_ttt.doctor.findings import Finding
from megatron_ttt.errors import UserError
from megatron_ttt.planning import memory_per_rank
from megatron_ttt.planning.cost import GIB

STEPS = 10
RESUME_FROM = 5
FEW_LAYERS = 2
FEW_TOKENS = 256
MEMORY_SHARE = 0.9
TOLERANCE = 1e-3
"""Relative difference of a resumed loss on CUDA, where sums may be taken in another order."""
PRETRAIN = Path(__file__).parents[2] / "pretrain_ttt.py"


def run_trial(config: Config, processes: int | None) -> Iterator[Finding]:
    """Train and resume; processes: None for this machine's GPUs, or for one copy of the model."""
    on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
    if processes is None:
        gpus = torch.cuda.device_count() if on_gpu else 0
        processes = gpus or config.parallel.model_parallel_size
    trial, reductions = trial_config(config, processes, on_gpu)
    runs = Path(config.run.dir).absolute().parent
    run_dir = runs / f"doctor-trial-{Path(config.run.dir).name}"
    if run_dir.exists():
        raise UserError(f"{run_dir} exists: another trial runs, or one was killed; remove it")
    run_dir.mkdir(parents=True)
    try:
        trial.run.dir = str(run_dir)
        if not _has_data(config):
            reductions.append("random tokens, as the recipe's are not there")
            trial.data.fixed_batches = str(_random_tokens(trial, run_dir))
            trial.data.train, trial.data.tokenizer_model = [], None
        if reductions:
            yield Finding("note", "trial", "not the whole recipe: " + ", ".join(reductions))
        recipe = run_dir / "trial.yaml"
        recipe.write_text(yaml.safe_dump(to_dict(trial), sort_keys=False))
        yield from _train_and_resume(recipe, run_dir, processes, on_gpu)
    finally:
        shutil.rmtree(run_dir)


def trial_config(config: Config, processes: int, on_gpu: bool) -> tuple[Config, list[str]]:
    """The recipe as it is tried, and in words what is less than in the recipe."""
    trial = copy.deepcopy(config)
    training, parallel = trial.training, trial.parallel
    dp = check_layout(config, processes)
    reductions = []
    if not on_gpu:
        reason = "on the CPU"
    else:
        needed = sum(memory_per_rank(config, dp, on_cpu=False).values())
        held = torch.cuda.mem_get_info()[0] / GIB
        reason = f"the whole needs {needed:.0f} GiB of {held:.0f}"
        reason = reason if needed > MEMORY_SHARE * held else ""
    if reason:
        chunks = parallel.pipeline_model_parallel_size * (
            parallel.virtual_pipeline_model_parallel_size or 1
        )
        together = math.lcm(chunks, len(config.model.pattern))
        few_layers = -(-FEW_LAYERS // together) * together
        trial.model.num_layers = min(config.model.num_layers, few_layers)
        training.seq_length = min(config.training.seq_length, FEW_TOKENS)
        training.micro_batch_size = 1
        reductions += [
            f"{trial.model.num_layers} of {config.model.num_layers} layers",
            f"{training.seq_length} of {config.training.seq_length:,} tokens ({reason})",
        ]
    microbatches = parallel.pipeline_model_parallel_size
    training.global_batch_size = min(
        config.training.global_batch_size, training.micro_batch_size * dp * microbatches
    )
    reductions.append(
        f"{training.global_batch_size} of {config.training.global_batch_size} sequences a step"
    )
    training.steps = max(config.training.steps, STEPS)
    training.exit_step, training.log_every = STEPS, 1
    trial.checkpoint.save_every, trial.checkpoint.milestone_every = RESUME_FROM, 0
    trial.checkpoint.load, trial.checkpoint.keep = "auto", 0
    trial.data.validation = []
    trial.logging.wandb_mode = "disabled"
    return trial, reductions


def _has_data(config: Config) -> bool:
    """Whether the recipe's tokens are all there. Fixed batches have shapes of their own."""
    prefixes = [entry for entry in config.data.train if not entry.replace(".", "").isdigit()]
    tokenizer = config.data.tokenizer_model
    return (
        bool(prefixes)
        and all(bin_path(prefix).exists() for prefix in prefixes)
        and tokenizer is not None
        and Path(tokenizer).exists()
    )


def _random_tokens(trial: Config, folder: Path) -> Path:
    training = trial.training
    shape = STEPS, training.global_batch_size, training.seq_length + 1
    path = folder / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(2, trial.model.vocab_size, shape))
    return path


def _train_and_resume(
    recipe: Path, run_dir: Path, processes: int, on_gpu: bool
) -> Iterator[Finding]:
    started = time.perf_counter()
    if failure := _train(recipe, processes):
        yield Finding("problem", "trial", failure)
        return
    first = _records(run_dir)
    losses = [record["loss"] for record in first]
    typical = float(np.median([record["seconds"] for record in first]))
    yield Finding(
        "problem" if not np.isfinite(losses).all() else "good",
        "trial",
        f"{STEPS} steps on {processes} process{'es' if processes > 1 else ''} in "
        f"{time.perf_counter() - started:.0f} s, {typical:.2f} s a step, "
        f"at most {first[-1]['memory_gib']:.2f} GiB on rank 0, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}",
    )
    shutil.rmtree(run_dir / f"checkpoint-{STEPS}")
    if failure := _train(recipe, processes):
        yield Finding("problem", "resume", failure)
        return
    if f"checkpoint-{RESUME_FROM} at step {RESUME_FROM}" not in _log(recipe).read_text():
        yield Finding("problem", "resume", f"it did not go on from checkpoint-{RESUME_FROM}")
        return
    resumed = [record["loss"] for record in _records(run_dir)]
    if resumed == losses:
        text = f"from step {RESUME_FROM} on, the same losses to the last bit"
        yield Finding("good", "resume", text)
        return
    apart = float(np.max(np.abs(np.array(resumed) / np.array(losses) - 1)))
    yield Finding(
        "good" if on_gpu and apart < TOLERANCE else "problem",
        "resume",
        f"from step {RESUME_FROM} on, losses differ by up to {apart:.1e} of their value",
    )


def _train(recipe: Path, processes: int) -> str | None:
    """Run the trial from where it is; why it failed, or None."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(PRETRAIN), "--config", str(recipe)]
    log = _log(recipe)
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code == 0:
        return None
    lines = log.read_text().splitlines()
    said = [line for line in lines if line.startswith("error")]
    said = said or [line for line in lines if "Error" in line] or lines[-1:]
    return f"ended with exit code {code}: {said[0] if said else 'it said nothing'}"


def _log(recipe: Path) -> Path:
    return recipe.parent / "log"


def _records(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
