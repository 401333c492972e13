#!/usr/bin/env python3
"""From nothing to a trained toy model on the CPU, in the commands a real run takes.

    make quickstart

Text that is on every machine (Python's own help pages and docstrings) becomes C4-format shards, a
tokenizer, a .bin/.idx dataset, and a small TTT-Linear model, trained by two tensor-parallel
processes that are stopped in the middle and resumed. The finished model, as a Hugging Face
directory, then writes a sample. The figures go to runs/quickstart/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_ttt.config import Config, check_layout, load_config
from megatron_ttt.data.local_text import write_local_corpus
from megatron_ttt.data.unigram import unigram_entropy
from megatron_ttt.errors import UserError, run_command

FINAL_MODEL = "final_model"
RECIPE = "yaml_recipes/quickstart.yaml"
FOLDER = Path("runs/quickstart")


def main() -> None:
    """Run every stage and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for the training")
    overrides = parser.parse_args().overrides
    config = load_config([RECIPE], overrides)
    check_layout(config, config.parallel.model_parallel_size)
    shutil.rmtree(FOLDER, ignore_errors=True)  # only now: a typo loses nothing

    prepare_data(config)
    middle = config.training.steps // 2
    train(config, [*overrides, f"training.exit_step={middle}"])
    train(config, overrides)
    checkpoint = f"{config.run.dir}/checkpoint-{config.training.steps}"
    summary = summarise(config, checkpoint)
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def prepare_data(config: Config) -> None:
    """Text, tokenizer and datasets, where the recipe looks for them."""
    title("Text that is already here, as C4-format shards")
    print(write_local_corpus(FOLDER / "c4"))
    data = FOLDER / "data"
    title("A SentencePiece tokenizer")
    tokenizer = data / "tokenizer"
    shards = str(FOLDER / "c4/c4-train.*.json.gz")
    python(
        "tools/train_tokenizer.py",
        *("--input", shards),
        *("--vocab-size", config.model.vocab_size),
        *("--output-prefix", tokenizer),
    )
    title("Tokens, as .bin/.idx")
    for split in ("train", "validation"):
        python(
            "tools/preprocess_c4.py",
            *("--input", FOLDER / f"c4/c4-{split}.*.json.gz"),
            *("--output-prefix", data / split),
            *("--tokenizer-model", f"{tokenizer}.model"),
            *("--prepend-bos", "--append-eod", "--workers", 2),
        )


def train(config: Config, overrides: list[str]) -> None:
    """Train, from the newest checkpoint there is."""
    title("Training: " + (" ".join(overrides) or "to the end"))
    parallel = config.parallel.model_parallel_size
    python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", parallel),
        *("pretrain_ttt.py", "--config", RECIPE, "logging.inner_statistics_every=20", *overrides),
    )


def summarise(config: Config, checkpoint: str) -> dict:
    """The figures of the finished run."""
    title("The same weights, with the inner learning rate at zero")
    output = python(
        "tools/evaluate.py",
        *("--checkpoint", checkpoint, "mixers.ttt_linear.base_lr=0"),
        capture=True,
    )
    no_inner = json.loads(output.splitlines()[-1])["loss"]
    metrics = Path(config.run.dir) / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    validation = [record for record in records if "val_loss" in record]
    return {
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "val_loss": validation[-1]["val_loss"],
        "val_loss_no_inner": no_inner,
        "unigram_entropy": unigram_entropy(
            config.data.train[0], config.data.validation[0], config.model.vocab_size
        ),
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "tokens_per_second": round(steps[-1]["tokens"] / sum(s["seconds"] for s in steps), 1),
        "checkpoint_dir": checkpoint,
        "hf_dir": f"{config.run.dir}/{FINAL_MODEL}",
        "sample": sample(f"{config.run.dir}/{FINAL_MODEL}"),
    }


def sample(hf_dir: str) -> str:
    """What the exported model writes."""
    title("The exported model writes")
    output = FOLDER / "sample.json"
    python(
        "tools/generate.py",
        *("--hf", hf_dir, "--prompt", "The function returns"),
        *("--max-new-tokens", 60, "--temperature", 0.8, "--json", output, "run.device=cpu"),
    )
    return json.loads(output.read_text())["text"]


def python(*arguments, capture: bool = False) -> str:
    """Run a command of this Python's, shown as one would type it; its stdout if captured."""
    arguments = [str(argument) for argument in arguments]
    print(f"$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the command above ended with exit code {done.returncode}")
    return done.stdout


def title(text: str) -> None:
    """A stage's heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
