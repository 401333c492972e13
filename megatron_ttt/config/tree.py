"""The typed tree of the configuration. Every field is documented by the string under it; the
configuration reference is made from those.

The options of mixers are typed too: each mixer's own dataclass (`megatron_ttt/mixers/`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import MISSING

from megatron_ttt.mixers import DEFAULT_PATTERN


@dataclass
class ModelConfig:
    """What is trained; with `mixers`, everything a checkpoint must agree on."""

    pattern: list[str] = field(default_factory=lambda: list(DEFAULT_PATTERN))
    """Mixers of the layers, by name, repeated to num_layers: [a, a, b] is two layers of a, then one
    of b, again and again."""
    mixer_modules: list[str] = field(default_factory=list)
    """Python modules that register further mixers (see `docs/mixers.md`)."""
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
    tie_word_embeddings: bool = True
    """Use the embedding as the head's weight too."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial linear, embedding, W1, W2 and lr-gate weights."""

    @property
    def head_dim(self) -> int:
        """Width f of one head."""
        return self.hidden_size // self.num_heads


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
    """Warm the inner learning rate up with the outer, from a tenth of it; null: as the recipe of
    the layers' mixers does (TTT-MLP's)."""


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
    mixers: Any = field(default_factory=dict)
    """The options of the mixers in `model.pattern`, by their names."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration, as `--print-config` shows it."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of dicts by their dotted keys."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten_tree(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
