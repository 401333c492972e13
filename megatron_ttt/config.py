"""The configuration: one typed tree, read from YAML, merged with `key.path=value` overrides.

Every field is documented by the string under it; the configuration reference is made from those.
A recipe may name others in `extends:`; it then holds only what differs from them. `${section.key}`
in a recipe or an override stands for that key's value, and nothing else is filled in: what a run is
told stays in its checkpoints, exports and logs, where a secret of the environment must not be.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.errors import UserError

LAYERS = ("ttt_linear", "ttt_mlp", "attention")
BACKBONES = ("mamba", "transformer")
PRECISIONS = ("bf16", "fp32")
SCAN_BACKENDS = ("auto", "naive", "torch", "cpp", "triton")
_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")


@dataclass
class ModelConfig:
    """What is trained; everything a checkpoint must agree on."""

    layer: str = "ttt_linear"
    """Sequence mixer: ttt_linear, ttt_mlp, or attention (the Transformer baseline)."""
    backbone: str = "mamba"
    """TTT only. mamba: pre-conv, shared q/k projection with two convs, gate (the paper's main
    model). transformer: none of the three, separate q and k."""
    num_layers: int = MISSING
    """Number of blocks."""
    hidden_size: int = MISSING
    """Width D of the residual stream."""
    num_heads: int = MISSING
    """Heads; head_dim is hidden_size / num_heads."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU."""
    vocab_size: int = 32000
    """Entries of the embedding (in memory padded to a multiple of the tensor-parallel size)."""
    mini_batch_size: int = 16
    """TTT: tokens K of one inner gradient step."""
    ttt_base_lr: float = 1.0
    """TTT: inner learning rate before the gate; the paper uses 1.0 (Linear) and 0.1 (MLP)."""
    conv_kernel: int = 4
    """Mamba backbone: width of the causal convolutions."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial linear, embedding, W1, W2 and lr-gate weights."""

    @property
    def head_dim(self) -> int:
        """Width f of one head."""
        return self.hidden_size // self.num_heads

    @property
    def is_ttt(self) -> bool:
        """Whether the mixer is a TTT layer."""
        return self.layer != "attention"

    @property
    def is_mamba(self) -> bool:
        """Whether the blocks have the Mamba backbone's convolutions and gate."""
        return self.is_ttt and self.backbone == "mamba"


@dataclass
class ParallelConfig:
    """How the model is laid out over processes. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's heads and columns (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages of layers (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per stage for the interleaved schedule (VPP); null for one."""
    sequence_parallel: bool = False
    """Shard norms, pre-conv and residual along the sequence over the TP ranks (SP)."""
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with computation."""
    bucket_size: int | None = None
    """Parameters per gradient bucket; null for megatron-core's choice (at least 40M)."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; defaults are the paper's recipe."""

    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate that the cosine ends at."""
    warmup_fraction: float = 0.1
    """Share of the steps that warm up, from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_all: bool = True
    """True: decay every parameter, as the paper's recipe does. False: megatron's habit, which
    leaves 1-D parameters and biases alone."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    inner_lr_warmup: bool | None = None
    """Warm the inner learning rate up with the outer, from a tenth of it; null: for ttt_mlp."""


@dataclass
class TrainingConfig:
    """The loop."""

    steps: int = MISSING
    """Optimizer steps of the whole run; the schedules end here."""
    exit_step: int | None = None
    """Stop after this step (save, validate) with the schedules unchanged; null: at `steps`."""
    seq_length: int = 2048
    """Tokens of a sequence."""
    micro_batch_size: int = 1
    """Sequences of one forward pass of one process."""
    global_batch_size: int = 256
    """Sequences of one optimizer step, over all processes."""
    precision: str = "bf16"
    """bf16 (weights and matmuls; fp32 main parameters, inner state and statistics) or fp32."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass."""
    scan_backend: str = "auto"
    """TTT: how the scan runs: naive, torch, cpp (CPU), triton (CUDA), or auto, the fastest here."""
    log_every: int = 10
    """Steps between log lines (metrics.jsonl has every step)."""
    eval_every: int | None = None
    """Steps between validations; null: only at the end."""
    eval_batches: int = 8
    """Global batches of one validation."""
    exit_after_minutes: float | None = None
    """Save and stop after this time, counted from the start of the command; null: never."""
    max_bad_steps: int = 10
    """Steps whose loss or gradients are not finite are skipped; stop after so many in a row."""
    check_replicas_every: int = 100
    """Steps between comparisons of weights and optimizer state with their copies on other ranks,
    and of bf16 weights with the optimizer's main parameters; 0: only before a save."""
    deterministic: bool = False
    """CUDA: repeat results bit for bit, slower. The CPU always does."""


@dataclass
class DataConfig:
    """Tokens to train on. Prefixes are paths of .bin/.idx pairs without the ending."""

    train: list[str] = field(default_factory=list)
    """Prefixes, optionally each preceded by its weight: [0.3, a, 0.7, b]."""
    validation: list[str] = field(default_factory=list)
    """Prefixes for validation; empty: none is run."""
    tokenizer_model: str | None = None
    """SentencePiece model the data was tokenized with."""
    fixed_batches: str | None = None
    """A .npy of token ids [S, B, L+1] instead of `train`: batch s is trained at step s."""
    cache_dir: str | None = None
    """Where index caches go; null: `cache` in the run folder."""
    mask_bos: bool = True
    """Leave targets equal to the tokenizer's BOS out of the loss, as the paper's recipe does."""
    bos_id: int = 1
    """BOS id where there is no tokenizer_model."""
    num_workers: int = 0
    """Processes that prefetch batches; 0 reads in this one."""


@dataclass
class CheckpointConfig:
    """What is kept and what is resumed from."""

    save_every: int = 1000
    """Steps between `checkpoint-STEP/`; 0: only at the end."""
    milestone_every: int = 2000
    """Steps between `milestone-STEP/`, which are never removed; 0: none."""
    keep: int = 5
    """Newest checkpoints kept, beside milestones and the best by validation loss; 0: all."""
    asynchronous: bool = False
    """Write checkpoints in the background, while training goes on (see `docs/checkpoints.md`)."""
    on_save_error: str = "warn"
    """When a checkpoint cannot be written (a full disk): warn and go on until the next, or stop."""
    export_final: bool | None = None
    """Write the last step's weights as a Hugging Face directory, `final_model/`; null: where
    data.tokenizer_model is set."""
    export_milestones: bool = False
    """Write one beside each milestone too, `milestone-STEP-hf/`, while training goes on."""
    load: str = "auto"
    """auto: go on from the newest checkpoint in run.dir that is undamaged; none: start anew. A
    checkpoint folder: start from it, unless run.dir has a checkpoint already; one of run.dir's own:
    go back to it, once."""


@dataclass
class LoggingConfig:
    """Where figures go besides the terminal and metrics.jsonl."""

    wandb_mode: str = "disabled"
    """Weights & Biases: disabled, offline or online."""
    wandb_project: str = "megatron-ttt"
    """Project on W&B."""
    tensorboard: bool = False
    """Write TensorBoard event files to `tensorboard/` in the run folder."""
    live: bool = False
    """Show the run as a live view in place of log lines, where there is a terminal."""
    inner_statistics_every: int = 0
    """TTT: steps between looks at the inner loop of every layer (losses, learning rates, state), on
    a few sequences of the step; 0: none."""


@dataclass
class RunConfig:
    """This run."""

    dir: str = MISSING
    """Folder of checkpoints, metrics.jsonl and the resolved configuration."""
    seed: int = 42
    """Seed of the initial weights and of the data order."""
    device: str = "auto"
    """auto, cuda or cpu."""
    timeout_minutes: float = 10.0
    """Longest wait for another process before the run ends with an error."""


@dataclass
class Config:
    """The whole tree."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def load_config(paths: list[str | Path], overrides: list[str] = ()) -> Config:
    """Read recipes, the later over the earlier, then `key.path=value` overrides, and validate.

    Raises UserError, one line, for a file, key, type or combination that cannot be used.
    """
    return _merge([item for path in paths for item in _read(Path(path))], overrides)


def config_from_tree(tree: dict[str, Any], source: str, overrides: list[str] = ()) -> Config:
    """The configuration of a tree of plain data, under overrides, validated.

    The tree is a checkpoint's, and may be a stranger's: a `${...}` in it stands for itself. source:
    where it is from, for messages.
    """
    return _merge([(source, _literal(tree))], overrides)


def _merge(trees: list[tuple[str, dict]], overrides: list[str]) -> Config:
    """Lay trees and then overrides over the defaults; each comes with where it is from."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is no override: write key.path=value")
        with _refusing(override):
            tree = OmegaConf.create()
            OmegaConf.update(tree, key, _value(key, text))
            trees.append((override, _by_hand(OmegaConf.to_container(tree), override)))
    merged = OmegaConf.structured(Config)
    for source, tree in trees:
        with _refusing(source):
            merged = OmegaConf.merge(merged, tree)
    config: Config = _to_dataclass(merged)
    validate(config)
    return config


def _by_hand(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """A tree as people write it. Raises UserError where it asks for more than another key."""
    for text in _texts(tree):
        if "${" in _REFERENCE.sub("", text):
            raise UserError(
                f"{source}: {text!r}: only ${{section.key}} is filled in, nothing of the "
                "environment: write the value itself"
            )
    data = tree.get("data")
    for key in ("train", "validation") if isinstance(data, dict) else ():
        # One prefix needs no brackets, and "0.3 a 0.7 b" is how Megatron writes a blend.
        prefixes = data.get(key)
        if isinstance(prefixes, str) and not _REFERENCE.fullmatch(prefixes):
            data[key] = prefixes.split()
    return tree


def _texts(value: Any) -> Iterator[str]:
    """Every text in a tree."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _literal(value: Any) -> Any:
    """A tree in which OmegaConf finds nothing to fill in: each `${`, and what backslashes are
    before it, is escaped."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _literal(part) for key, part in value.items()}
    return [_literal(part) for part in value] if isinstance(value, list) else value


def _value(key: str, text: str) -> Any:
    """What an override sets a key to. Where the key takes strings that is the text as it is
    written, or null, or a YAML list of them; else a YAML value."""
    kind = _type_of(key)
    if kind in (str, str | None, list[str]) and not (kind == list[str] and text.startswith("[")):
        return None if text in ("", "null", "~") else text
    node = yaml.compose(text, _Loader)
    if node is not None and node.end_mark.index < len(text.rstrip()):
        return text  # a comment follows: YAML would leave it out
    return yaml.load(text, yaml.BaseLoader if kind == list[str] else _Loader)


def _type_of(key: str) -> Any:
    """The declared type of a key; None where there is no such key."""
    section, _, name = key.partition(".")
    declared = get_type_hints(Config).get(section)
    return get_type_hints(declared).get(name) if declared else None


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration, as `--print-config` shows it."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """What YAML and OmegaConf make of a tree they cannot use, as one line that names its source."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: an alias stands within what it stands for") from None
    except (TypeError, ValueError) as error:
        # OmegaConf's, of a mapping where a list belongs; YAML's, of a date that there is not
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two sections of one name the first would be lost."""

    def compose_mapping_node(self, anchor):
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} stands twice", problem_mark=key.start_mark
                    )
                keys.add((key.tag, key.value))
        return node


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The trees of a recipe and of those it extends, in the order they are merged."""
    if path.resolve() in map(Path.resolve, seen):
        raise UserError(f"{path} extends itself: {' -> '.join(map(str, (*seen, path)))}")
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not YAML: it is no text") from None
    with _refusing(str(path)):
        tree = yaml.load(text, _Loader)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not sections with keys")
    extends = tree.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise UserError(f"{path}: extends={extends} is neither a recipe's path nor a list of them")
    trees = [item for name in parents for item in _read(path.parent / name, (*seen, path))]
    with _refusing(str(path)):
        return [*trees, (str(path), _by_hand(tree, str(path)))]


def _to_dataclass(merged) -> Config:
    with _refusing("the configuration"):
        missing = OmegaConf.missing_keys(merged)
        if missing:
            keys = ", ".join(sorted(missing))
            raise UserError(f"not set: {keys}. Set each in the recipe or as key.path=value")
        return OmegaConf.to_object(merged)


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, the key's full name, and for an unknown key what there is."""
    message = str(error).splitlines()[0]
    full_key = getattr(error, "full_key", None)
    parent = getattr(error, "object_type", None)
    if "not in" in message and dataclasses.is_dataclass(parent):
        names = ", ".join(f.name for f in dataclasses.fields(parent))
        return f"unknown key {full_key!r}; there are: {names}"
    return f"{full_key}: {message}" if full_key else message


def validate(config: Config) -> None:
    """Refuse values that cannot work at any layout; `check_layout` needs the world size."""
    model, training, parallel = config.model, config.training, config.parallel
    _one_of("model.layer", model.layer, LAYERS)
    _one_of("model.backbone", model.backbone, BACKBONES)
    if training.precision in ("fp16", "float16", "half"):
        raise UserError("training.precision=fp16 is not supported: use bf16 (or fp32)")
    _one_of("training.precision", training.precision, PRECISIONS)
    _one_of("training.scan_backend", training.scan_backend, SCAN_BACKENDS)
    _one_of("checkpoint.on_save_error", config.checkpoint.on_save_error, ("warn", "stop"))
    _one_of("run.device", config.run.device, ("auto", "cuda", "cpu"))
    _one_of("logging.wandb_mode", config.logging.wandb_mode, ("disabled", "offline", "online"))
    for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size"):
        _at_least(f"model.{name}", getattr(model, name), 1)
    _at_least("model.mini_batch_size", model.mini_batch_size, 1)
    _at_least("model.conv_kernel", model.conv_kernel, 2)
    for name in ("norm_eps", "rope_theta"):
        _at_least(f"model.{name}", getattr(model, name), 1e-12)
    for name in ("init_std", "ttt_base_lr"):
        _at_least(f"model.{name}", getattr(model, name), 0)
    for name in ("steps", "seq_length", "micro_batch_size", "global_batch_size", "log_every"):
        _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        _at_least(f"parallel.{name}", getattr(parallel, name), 1)
    for name in ("save_every", "milestone_every", "keep"):
        _at_least(f"checkpoint.{name}", getattr(config.checkpoint, name), 0)
    _at_least("logging.inner_statistics_every", config.logging.inner_statistics_every, 0)
    if config.logging.inner_statistics_every and not model.is_ttt:
        raise UserError(
            f"logging.inner_statistics_every={config.logging.inner_statistics_every}, but "
            "model.layer=attention has no inner loop: set 0"
        )
    _at_least("training.check_replicas_every", training.check_replicas_every, 0)
    _at_least("training.max_bad_steps", training.max_bad_steps, 1)
    _at_least("training.eval_batches", training.eval_batches, 1)
    _at_least("run.timeout_minutes", config.run.timeout_minutes, 0.01)
    for key, value, least in (
        ("training.eval_every", training.eval_every, 0),
        ("training.exit_after_minutes", training.exit_after_minutes, 0),
        ("parallel.bucket_size", parallel.bucket_size, 1),
    ):
        if value is not None:
            _at_least(key, value, least)
    _at_least("data.num_workers", config.data.num_workers, 0)
    for name in ("train", "validation"):
        for entry in getattr(config.data, name):
            if not isinstance(entry, str):
                raise UserError(f"data.{name} holds {entry}: list prefixes and their weights alone")
    if not 0 <= config.run.seed < 2**32:
        raise UserError(f"run.seed={config.run.seed} is out of range: set 0 to {2**32 - 1}")
    optimizer = config.optimizer
    for name in ("lr", "min_lr", "weight_decay", "eps", "clip_grad"):
        _at_least(f"optimizer.{name}", getattr(optimizer, name), 0)
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
    if model.head_dim % 2:
        raise UserError(
            f"head_dim {model.head_dim} (hidden_size / num_heads) is odd; RoPE rotates pairs: "
            "change model.num_heads"
        )
    if training.exit_step is not None and not 0 < training.exit_step <= training.steps:
        raise UserError(
            f"training.exit_step={training.exit_step} is not within 1 to "
            f"training.steps={training.steps}"
        )


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
    if (
        parallel.sequence_parallel
        and model.is_mamba
        and training.seq_length // tp < model.conv_kernel - 1
    ):
        raise UserError(
            f"training.seq_length={training.seq_length} leaves {training.seq_length // tp} tokens "
            f"a rank, fewer than the {model.conv_kernel - 1} that the pre-conv looks back"
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


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is none of {', '.join(choices)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value == math.inf:
        raise UserError(f"{key}={value} is too large: set a finite number")
    if not value >= least:  # NaN is not
        raise UserError(f"{key}={value} is too small: set {least} or more")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
