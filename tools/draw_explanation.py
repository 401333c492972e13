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
    if (RUNS / layer / f"checkpoint-{steps}").exists():
        return
    python(
        *("pretrain_ttt.py", "--config", RECIPE, f"model.pattern={layer}"),
        *(f"run.dir={RUNS / layer}", f"training.steps={steps}", "checkpoint.export_final=false"),
        *("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"),
        *("training.micro_batch_size=4", "training.global_batch_size=4"),
        f"checkpoint.save_every={steps}",
    )


def evaluate(layer: str, steps: int) -> list[float]:
    """The validation loss at each position, nats."""
    output = RUNS / layer / f"by_position-{steps}.json"
    if not output.exists():
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


def inner_losses(checkpoint: Path) -> dict[str, list[list[float]]]:
    """By layer and mini-batch, the inner loss of its last token under the state the sequence starts
    from, under the state before the mini-batch and under the state after it (ops/statistics.py);
    means over heads and validation sequences."""
    from megatron_ttt import evaluation
    from megatron_ttt.data.batches import open_data
    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.inner_loop import observe_inner_loop

    config = evaluation.evaluation_config(str(checkpoint), ["run.device=cpu"])
    evaluator = evaluation.Evaluator(config, prepare_process(config), str(checkpoint), None)
    batches = open_data(config, train=False).validation_batches()

    def read() -> None:
        for tokens in batches:
            evaluator.logits(tokens[:, :-1])

    seen = observe_inner_loop(evaluator.chunks, read)
    return {
        name: [[round(loss, 5) for loss in getattr(of, name).tolist()] for of in seen.values()]
        for name in ("loss_init", "loss_before", "loss_after")
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


def draw_inner(inner: dict[str, list[list[float]]], path: Path) -> None:
    """The inner loss of the last layer by mini-batch."""
    figure, axes = new_figure()
    labels = {
        "loss_init": "under the initial state W0",
        "loss_before": "before the mini-batch's step",
        "loss_after": "after the mini-batch's step",
    }
    for name, label in labels.items():
        losses = inner[name][-1]
        axes.plot(range(1, len(losses) + 1), losses, "o-", ms=3, label=label)
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
