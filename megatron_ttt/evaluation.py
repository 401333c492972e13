"""A model's loss, loss by position, logits and gradients.

The model is a checkpoint's, in megatron-core at any layout (`Evaluator`), or a Hugging Face
directory's, in transformers (`OfficialEvaluator`); both answer the same questions.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ttt.checkpoint.run_folder import open_checkpoint
from megatron_ttt.checkpoint.state import load_weights
from megatron_ttt.checkpoint.verification import open_whole_together
from megatron_ttt.config import Config, config_with_defaults
from megatron_ttt.data.batches import open_data
from megatron_ttt.errors import UserError
from megatron_ttt.hf.configuration import architecture_from_hf_config, read_hf_config
from megatron_ttt.hf.export_manifest import read_evaluation
from megatron_ttt.hf.mapping import gather_hf
from megatron_ttt.model import build_chunks, make_transformer_config
from megatron_ttt.stack import architecture_of


class Evaluator:
    """A checkpoint's model, built at the layout of `config`, with its weights loaded.

    dtype: float64 or float32; None for `training.precision`'s.
    """

    def __init__(self, config: Config, platform, checkpoint: str, dtype: torch.dtype | None):
        self.config, self.device = config, platform.device
        self.chunks = build_chunks(config, make_transformer_config(config, platform, dtype))
        load_weights(open_whole_together(checkpoint), self.chunks)
        for chunk in self.chunks:
            chunk.eval()

    @torch.no_grad()
    def token_losses(self, tokens: Tensor) -> Tensor | None:
        """tokens [B, L+1] -> cross-entropies [B, L], on the last pipeline stage; elsewhere None."""
        labels = tokens[:, 1:].contiguous().to(self.device)
        results = self._run(
            self.chunks, tokens[:, :-1], _collect, labels=labels, collect_non_loss_data=True
        )
        return results[0] if results else None

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor | None:
        """input_ids [B, L] -> logits [B, L, V], on the last pipeline stage; elsewhere None."""
        results = self._run(self.chunks, input_ids, _collect, collect_non_loss_data=True)
        return self._whole(results[0]) if results else None

    def gradients(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Gradients of the mean next-token cross-entropy, all of them, under official names.

        The cross-entropy is taken from the logits, in their dtype. Every rank gets all.
        """
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
        ddp_chunks = [DistributedDataParallel(c.config, options, c) for c in self.chunks]
        self.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        for ddp in ddp_chunks:
            ddp.zero_grad_buffer()
        self._run(ddp_chunks, input_ids, partial(self._cross_entropy, input_ids), backward=True)
        return gather_hf(self.chunks, architecture_of(self.config), lambda p: p.main_grad)

    def _run(
        self, chunks: list[nn.Module], input_ids, loss, *, labels=None, backward=False, **options
    ):
        def forward_step(batches, chunk):
            return chunk(next(batches), None, None, labels=labels), loss

        batch, length = input_ids.shape
        self._check_length(length)
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([input_ids.to(self.device)]) for _ in chunks],
            model=chunks,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            decoder_seq_length=length,
            forward_only=not backward,
            **options,
        )

    def _check_length(self, length: int) -> None:
        parallel = self.config.parallel
        if not parallel.sequence_parallel:
            return
        tp = parallel.tensor_model_parallel_size
        if length % tp:
            raise UserError(
                f"sequences of {length} tokens do not divide over {tp} ranks: set "
                "parallel.sequence_parallel=false"
            )
        reach = architecture_of(self.config).pre_conv_reach
        if length // tp < reach:
            raise UserError(
                f"sequences of {length} tokens leave {length // tp} a rank, fewer than the "
                f"{reach} that the pre-conv looks back: set parallel.sequence_parallel=false"
            )

    def _whole(self, logits: Tensor) -> Tensor:
        """This rank's columns [B, L, V/TP] -> [B, L, V]."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return whole[..., : self.config.model.vocab_size]

    def _cross_entropy(self, input_ids: Tensor, logits: Tensor):
        logits = self._whole(logits)
        targets = input_ids[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        return loss, {"loss": loss.detach().clone()}


def _collect(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output


class OfficialEvaluator:
    """A Hugging Face directory's model, whole in each process; dtype as for `Evaluator`."""

    def __init__(self, folder: Path, platform, dtype: torch.dtype | None):
        from megatron_ttt.hf.loading import load_directory

        self.device = platform.device
        self.network = load_directory(folder, dtype).to(platform.device)

    @torch.no_grad()
    def token_losses(self, tokens: Tensor) -> Tensor:
        """tokens [B, L+1] -> cross-entropies [B, L]."""
        logits = self.logits(tokens[:, :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = tokens[:, 1:].to(self.device)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, L] -> logits [B, L, V]."""
        return self.network(input_ids.to(self.device), use_cache=False).logits

    def gradients(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As `Evaluator.gradients`."""
        input_ids = input_ids.to(self.device)
        logits = self.network(input_ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        return {name: parameter.grad for name, parameter in self.network.named_parameters()}


def measure(evaluator: Evaluator | OfficialEvaluator, config: Config) -> dict[str, Any]:
    """Losses over `data.validation`: the recipe's mean and one by position; every rank gets them.

    loss: mean over each sequence's targets, then over sequences. loss_by_position: mean over the
    sequences of the cross-entropy of the token after position i (null where all targets are
    masked). Targets equal to BOS do not count where training masks them.
    """
    data = open_data(config, train=False)
    batches = data.validation_batches()
    if not batches:
        raise UserError("data.validation is not set: name what to evaluate on")
    for note in data.notes if dist.get_rank() == 0 else ():
        print(note, file=sys.stderr, flush=True)
    length = batches[0].shape[1] - 1
    # Rows: summed losses and counted targets by position; then, the sequences' means and number.
    sums = torch.zeros(3, max(length, 2), dtype=torch.float64)
    for tokens in batches:
        losses = evaluator.token_losses(tokens)
        if losses is None:
            continue
        kept = torch.ones_like(losses, dtype=torch.float64, device="cpu")
        if data.ignored_target_id is not None:
            kept = (tokens[:, 1:] != data.ignored_target_id).double()
        losses = losses.double().cpu() * kept
        sums[0, :length] += losses.sum(0)
        sums[1, :length] += kept.sum(0)
        sums[2, 0] += (losses.sum(1) / kept.sum(1).clamp_min(1.0)).sum()
        sums[2, 1] += len(tokens)
    sums = sums.to(evaluator.device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.broadcast(
        sums,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    total, count, (loss, sequences) = sums[0, :length], sums[1, :length], sums[2, :2].tolist()
    loss /= sequences
    by_position = [t / c if c else None for t, c in zip(total.tolist(), count.tolist())]
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "sequences": int(sequences),
        "targets": int(count.sum()),
        "loss_by_position": by_position,
    }


def _perplexity(loss: float) -> float:
    """inf where it is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def plot_by_position(loss_by_position: list[float | None], path: Path) -> None:
    """Perplexity by token position, a PNG: mean losses over windows of a 32nd of the sequence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = np.array([math.nan if loss is None else loss for loss in loss_by_position])
    window = max(1, len(losses) // 32)
    edges = range(0, len(losses) - window + 1, window)
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    axes.plot(
        [start + window / 2 for start in edges],
        [_perplexity(np.nanmean(losses[start : start + window])) for start in edges],
        marker="o",
        markersize=3,
    )
    axes.set(xlabel="token position", ylabel="perplexity", xlim=(0, len(losses)))
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def read_input_ids(path: Path, vocab_size: int) -> Tensor:
    """Token ids [B, L] from a .npy file. Raises UserError for anything else."""
    try:
        ids = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read token ids from {path}: {error}") from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype}{list(ids.shape)}, not integer ids [B, L]")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(f"{path} holds ids outside the vocabulary of {vocab_size}")
    return torch.from_numpy(ids.astype(np.int64))


def is_last_stage_writer() -> bool:
    """Whether this rank writes what the last stage knows: one of the whole job."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def evaluation_config(checkpoint: str, overrides: list[str]) -> Config:
    """The configuration a checkpoint was trained with, under overrides.

    Layout, data and device come from the overrides; an imported checkpoint, which does not say how
    it is evaluated, is evaluated as the directory that it was imported from.
    """
    opened = open_checkpoint(checkpoint)
    tree: dict[str, Any] = dict(opened.config)
    tree.pop("parallel", None)
    if "training" not in tree:
        tree["training"] = _untrained(opened.state.get("official", {}))
    config = config_with_defaults(tree, Path(checkpoint), overrides)
    if (chunks := config.parallel.virtual_pipeline_model_parallel_size) is not None:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} speeds up training alone: "
            "leave it out"
        )
    return config


def official_config(folder: Path, overrides: list[str]) -> Config:
    """The configuration of a Hugging Face directory, under overrides.

    An export is evaluated as the checkpoint that it was made of; of another directory, sequences
    are as long as its config.json says. Its tokenizer.model, else tokenizer.json, is the tokenizer.
    """
    official = read_hf_config(folder / "config.json")
    tree = read_evaluation(folder)
    tree["training"] = {**_untrained(official), **tree.get("training", {})}
    tree |= architecture_from_hf_config(official).to_tree()
    files = (folder / "tokenizer.model", folder / "tokenizer.json")
    if there := [str(path) for path in files if path.exists()]:
        tree["data"] = {**tree.get("data", {}), "tokenizer_model": there[0]}
    return config_with_defaults(tree, folder, overrides)


def _untrained(official: dict[str, Any]) -> dict[str, Any]:
    """The training section of a model that was not trained here, by its config.json.

    It is evaluated on eight sequences, which up to eight data-parallel ranks can share.
    """
    length = official.get("max_position_embeddings", 2048)
    return {"seq_length": length, "global_batch_size": 8, "eval_batches": 1}
