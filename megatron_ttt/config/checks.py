"""Refuse configurations that cannot work: values out of range, layouts that do not fit."""

from __future__ import annotations

from megatron_ttt.config.tree import Config
from megatron_ttt.errors import UserError, check_at_least, check_choice
from megatron_ttt.mixers import MIXERS, check_known
from megatron_ttt.mixers.base import Dimensions

PRECISIONS = ("bf16", "fp32")
SCAN_BACKENDS = ("auto", "naive", "torch", "cpp", "triton")


def validate(config: Config) -> None:
    """Refuse values that cannot work at any layout; `check_layout` needs the world size."""
    model, training, parallel = config.model, config.training, config.parallel
    if training.precision in ("fp16", "float16", "half"):
        raise UserError("training.precision=fp16 is not supported: use bf16 (or fp32)")
    check_choice("training.precision", training.precision, PRECISIONS)
    check_choice("training.scan_backend", training.scan_backend, SCAN_BACKENDS)
    check_choice("checkpoint.on_save_error", config.checkpoint.on_save_error, ("warn", "stop"))
    check_choice("run.device", config.run.device, ("auto", "cuda", "cpu"))
    check_choice("logging.wandb_mode", config.logging.wandb_mode, ("disabled", "offline", "online"))
    for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size"):
        check_at_least(f"model.{name}", getattr(model, name), 1)
    check_at_least("model.norm_eps", model.norm_eps, 1e-12)
    check_at_least("model.init_std", model.init_std, 0)
    for name in ("steps", "seq_length", "micro_batch_size", "global_batch_size", "log_every"):
        check_at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        check_at_least(f"parallel.{name}", getattr(parallel, name), 1)
    for name in ("save_every", "milestone_every", "keep"):
        check_at_least(f"checkpoint.{name}", getattr(config.checkpoint, name), 0)
    check_at_least("logging.inner_statistics_every", config.logging.inner_statistics_every, 0)
    check_at_least("training.check_replicas_every", training.check_replicas_every, 0)
    check_at_least("training.max_bad_steps", training.max_bad_steps, 1)
    check_at_least("training.eval_batches", training.eval_batches, 1)
    check_at_least("run.timeout_minutes", config.run.timeout_minutes, 0.01)
    for key, value, least in (
        ("training.eval_every", training.eval_every, 0),
        ("training.exit_after_minutes", training.exit_after_minutes, 0),
        ("parallel.bucket_size", parallel.bucket_size, 1),
    ):
        if value is not None:
            check_at_least(key, value, least)
    check_at_least("data.num_workers", config.data.num_workers, 0)
    for name in ("train", "validation"):
        for entry in getattr(config.data, name):
            if not isinstance(entry, str):
                raise UserError(f"data.{name} holds {entry}: list prefixes and their weights alone")
    if not 0 <= config.run.seed < 2**32:
        raise UserError(f"run.seed={config.run.seed} is out of range: set 0 to {2**32 - 1}")
    optimizer = config.optimizer
    for name in ("lr", "min_lr", "weight_decay", "eps", "clip_grad"):
        check_at_least(f"optimizer.{name}", getattr(optimizer, name), 0)
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise UserError(
                f"optimizer.{name}={getattr(optimizer, name)} is out of range: set 0 or more, "
                "less than 1"
            )
    if not 0 <= config.optimizer.warmup_fraction <= 1:
        raise UserError(
            f"optimizer.warmup_fraction={config.optimizer.warmup_fraction} is no share: set 0 to 1"
        )
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by "
            f"model.num_heads={model.num_heads}"
        )
    _validate_mixers(config)
    if training.exit_step is not None and not 0 < training.exit_step <= training.steps:
        raise UserError(
            f"training.exit_step={training.exit_step} is not within 1 to "
            f"training.steps={training.steps}"
        )


def _validate_mixers(config: Config) -> None:
    model = config.model
    if not model.pattern:
        raise UserError("model.pattern is empty: name the layers' mixers")
    check_known(model.pattern)
    if model.num_layers % len(model.pattern):
        raise UserError(
            f"model.num_layers={model.num_layers} is not divisible by the {len(model.pattern)} "
            "layers of model.pattern"
        )
    for name, options in config.mixers.items():
        MIXERS[name].validate(_dimensions(config), options)
    every = config.logging.inner_statistics_every
    if every and not any(MIXERS[name].has_inner_loop for name in model.pattern):
        raise UserError(
            f"logging.inner_statistics_every={every}, but no layer of model.pattern has an inner "
            "loop: set 0"
        )


def _dimensions(config: Config) -> Dimensions:
    model = config.model
    return Dimensions(model.hidden_size, model.num_heads, model.init_std)


def check_layout(config: Config, world_size: int) -> int:
    """Refuse a layout that `world_size` processes cannot take; return the data-parallel size."""
    if world_size < 1:
        raise UserError(f"{world_size} processes train nothing: give 1 or more")
    model, training, parallel = config.model, config.training, config.parallel
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    if model.num_heads % tp:
        raise UserError(
            f"model.num_heads={model.num_heads} is not divisible by "
            f"parallel.tensor_model_parallel_size={tp}: choose one of {_divisors(model.num_heads)}"
        )
    if model.ffn_hidden_size % tp:
        raise UserError(
            f"model.ffn_hidden_size={model.ffn_hidden_size} is not divisible by "
            f"parallel.tensor_model_parallel_size={tp}"
        )
    for name, options in config.mixers.items():
        MIXERS[name].check_tensor_parallel(_dimensions(config), options, tp)
    if vpp is not None and (vpp < 2 or pp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs 2 or more, and "
            f"parallel.pipeline_model_parallel_size of 2 or more (now {pp}): set null for neither"
        )
    if model.num_layers % (pp * (vpp or 1)):
        raise UserError(
            f"model.num_layers={model.num_layers} is not divisible by pipeline stages x chunks = "
            f"{pp} x {vpp or 1}: choose parallel.pipeline_model_parallel_size from "
            f"{_divisors(model.num_layers)}"
        )
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size of 2 or more"
        )
    if parallel.sequence_parallel and training.seq_length % tp:
        raise UserError(
            f"training.seq_length={training.seq_length} is not divisible by "
            f"parallel.tensor_model_parallel_size={tp}, as parallel.sequence_parallel needs"
        )
    widths = [MIXERS[name].pre_conv_width(options) for name, options in config.mixers.items()]
    reach = max((width - 1 for width in widths if width), default=0)
    if parallel.sequence_parallel and training.seq_length // tp < reach:
        raise UserError(
            f"training.seq_length={training.seq_length} leaves {training.seq_length // tp} tokens "
            f"a rank, fewer than the {reach} that the pre-conv looks back"
        )
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"{world_size} processes are not divisible by TP x PP = {tp} x {pp}: launch a multiple "
            f"of {parallel.model_parallel_size}"
        )
    dp = world_size // parallel.model_parallel_size
    per_step = training.micro_batch_size * dp
    if training.global_batch_size % per_step:
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not divisible by "
            f"training.micro_batch_size x data-parallel size = {training.micro_batch_size} x {dp}"
        )
    microbatches = training.global_batch_size // per_step
    if vpp is not None and microbatches % pp:
        raise UserError(
            f"the interleaved schedule needs microbatches ({microbatches} a step) divisible by "
            f"parallel.pipeline_model_parallel_size={pp}: change training.micro_batch_size"
        )
    return dp


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
