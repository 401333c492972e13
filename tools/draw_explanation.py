#!/usr/bin/env python3
"""Draw the pictures of docs/ttt.md from models that were really trained.

    make quickstart && python tools/draw_explanation.py [--steps 200]

On quickstart's data, a small TTT-Linear model and a Transformer of the same size are trained from
the same seed for the same steps, on the CPU. The pictures then show, on validation text: the loss
by position of both models, and the inner loss of the TTT layers before and after each inner step.
Writes docs/images/*.svg and, beside them, the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_ttt.errors import UserError, run_command

RECIPE = "yaml_recipes/quickstart.yaml"
DATA = Path("runs/quickstart/data/train_text_document.bin")
RUNS = Path("runs/explanation")
IMAGES = Path("docs/images")
NAMES = {"ttt_linear": "TTT-Linear", "attention": "Transformer"}


def main() -> None:
    """Train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    if not DATA.exists():
        raise UserError(f"{DATA} not found: run make quickstart first")
    arguments.output.mkdir(parents=True, exist_ok=True)
    by_position = {}
    for layer in NAMES:
        train(layer, arguments.steps)
        by_position[layer] = evaluate(layer, arguments.steps)
    inner = inner_losses(RUNS / "ttt_linear" / f"checkpoint-{arguments.steps}")
    figures = {"steps": arguments.steps, "loss_by_position": by_position, "inner_loss": inner}
    (arguments.output / "explanation.json").write_text(json.dumps(figures) + "\n")
    draw_by_position(by_position, arguments.output / "loss_by_position.svg")
    draw_inner(inner, arguments.output / "inner_loss.svg")


def train(layer: str, steps: int) -> None:
    """One model on one process, unless it is there."""
    python(
        *("pretrain_ttt.py", "--config", RECIPE, f"model.layer={layer}"),
        *(f"run.dir={RUNS / layer}", f"training.steps={steps}", "checkpoint.export_final=false"),
        *("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"),
        *(
            "training.micro_batch_size=4",
            "training.global_batch_size=4",
            f"checkpoint.save_every={steps}",
        ),
    )


def evaluate(layer: str, steps: int) -> list[float]:
    """The validation loss at each position, nats."""
    output = RUNS / f"{layer}.json"
    python(
        *("tools/evaluate.py", "--checkpoint", RUNS / layer / f"checkpoint-{steps}"),
        *("--json", output, "training.eval_batches=64"),
    )
    return [round(loss, 4) for loss in json.loads(output.read_text())["loss_by_position"]]


def python(*arguments) -> None:
    """Run a command of this Python's."""
    command = [sys.executable, *map(str, arguments)]
    print("$ python", *command[1:], flush=True)
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
        raise UserError("the command above failed")


def inner_losses(checkpoint: Path) -> list[dict[str, list[float]]]:
    """By layer and mini-batch, 1/f ||LN(f(k)) - (v - k)||^2 over its tokens: under the initial
    state, under the state before the mini-batch, and under the state after it; with the mean square
    of the targets. Averaged over validation sequences and heads."""
    from megatron_ttt import evaluation
    from megatron_ttt.data.batches import open_data
    from megatron_ttt.layers import ttt_mixer
    from megatron_ttt.training.trainer import start

    config = evaluation.evaluation_config(str(checkpoint), ["run.device=cpu"])
    evaluator = evaluation.Evaluator(config, start(config), str(checkpoint), None)
    batches = open_data(config, train=False).validation_batches()[:8]
    layers: list[list] = [[] for _ in range(config.model.num_layers)]
    scan, calls = ttt_mixer.ttt_scan, []

    def watched(*inputs, **options):
        layers[len(calls) % len(layers)].append(losses_of_scan(scan, *inputs))
        calls.append(1)
        return scan(*inputs, **options)

    ttt_mixer.ttt_scan = watched
    try:
        for tokens in batches:
            evaluator.token_losses(tokens)
    finally:
        ttt_mixer.ttt_scan = scan
    return [mean_of(results) for results in layers]


def losses_of_scan(scan, q, k, v, lam, tau, gamma, beta, state) -> dict[str, list[float]]:
    """The inner losses of one layer on one batch, TTT-Linear, mini-batch by mini-batch."""
    import torch.nn.functional as F

    K = len(tau)
    initial = state = tuple(W.float().expand(*q.shape[:2], *W.shape[-2:]) for W in state)

    def loss(x, target, state):
        W, b = state
        normalised = F.layer_norm(x @ W + b, x.shape[-1:], eps=1e-6)
        output = gamma.unsqueeze(1) * normalised + beta.unsqueeze(1)
        return (output - target).square().mean().item()

    losses = {"initial": [], "before": [], "after": [], "target": []}
    for first in range(0, q.shape[2], K):
        part = [x[:, :, first : first + K] for x in (q, k, v)]
        x, target = part[1].float(), (part[2] - part[1]).float()
        _, after = scan(*part, lam[:, :, first : first + K], tau, gamma, beta, state)
        losses["initial"].append(loss(x, target, initial))
        losses["before"].append(loss(x, target, state))
        losses["after"].append(loss(x, target, after))
        losses["target"].append(target.square().mean().item())
        state = after
    return losses


def mean_of(results: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Mean over batches."""
    return {
        name: [round(sum(column) / len(column), 5) for column in zip(*(r[name] for r in results))]
        for name in results[0]
    }


def draw_by_position(by_position: dict[str, list[float]], path: Path) -> None:
    """Loss by position of both models, means over windows of 16 tokens."""
    figure, axes = new_figure()
    for layer, losses in by_position.items():
        windows = [losses[i : i + 16] for i in range(0, len(losses), 16)]
        positions = [16 * i + 8 for i in range(len(windows))]
        axes.plot(positions, [sum(w) / len(w) for w in windows], "o-", ms=3, label=NAMES[layer])
    axes.set(xlabel="token position", ylabel="validation loss, nats")
    save(figure, axes, path)


def draw_inner(inner: list[dict[str, list[float]]], path: Path) -> None:
    """The inner loss of the last layer by mini-batch."""
    figure, axes = new_figure()
    labels = {
        "initial": "under the initial state W0",
        "before": "before the mini-batch's step",
        "after": "after the mini-batch's step",
    }
    for name, label in labels.items():
        axes.plot(range(1, len(inner[-1][name]) + 1), inner[-1][name], "o-", ms=3, label=label)
    axes.set(xlabel="mini-batch of 16 tokens", ylabel="inner loss, last layer")
    save(figure, axes, path)


def new_figure():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "megatron-ttt"  # the same file for the same figures
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.5, 3.6), constrained_layout=True)


def save(figure, axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    print(f"Wrote {path}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
