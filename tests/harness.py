"""What the tests share: golden files, random models, and torchrun jobs that run many cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
WORKER = Path(__file__).parent / "worker.py"


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The official config and the tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    return config, load_file(GOLDEN / f"{name}.safetensors")


def section(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors under `kind/`, without it."""
    return {k[len(kind) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{kind}/")}


def write_official(folder: Path, config: dict, parameters: dict[str, torch.Tensor]) -> Path:
    """An official Hugging Face directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(parameters, folder / "model.safetensors")
    return folder


def model_section(config: dict[str, Any]) -> dict[str, Any]:
    """The recipe's model section for an official config."""
    from megatron_ttt.config import to_dict
    from megatron_ttt.hf.configuration import model_from_official

    return to_dict(model_from_official(config))


def random_official(
    kind: str, backbone: str, *, layers=4, width=64, heads=4, ffn=96, vocab=96, seed=0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An official config and parameters, every one of them off its trivial initial value."""
    mamba = backbone == "mamba"
    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mini_batch_size": 16,
        "ttt_layer_type": kind,
        "ttt_base_lr": 1.0 if kind == "linear" else 0.1,
        "use_gate": mamba,
        "share_qk": mamba,
        "pre_conv": mamba,
    }
    random = torch.Generator().manual_seed(seed)

    def around(mean, std, *shape):
        return mean + std * torch.randn(shape, generator=random)

    f = width // heads
    inner = (f, f) if kind == "linear" else (f, 4 * f, f)
    parameters = {
        "model.embed_tokens.weight": around(0, 0.1, vocab, width),
        "model.norm.weight": around(1, 0.2, width),
    }
    for layer in range(layers):
        p = f"model.layers.{layer}."
        t = p + "seq_modeling_block."
        for name in "qvgo" if mamba else "qkvo":
            parameters[f"{t}{name}_proj.weight"] = around(0, 0.15, width, width)
        for name in (t + "conv_q", t + "conv_k", p + "conv.conv") if mamba else ():
            parameters[f"{name}.weight"] = around(0, 0.4, width, 1, 4)
            parameters[f"{name}.bias"] = around(0, 0.1, width)
        if mamba:
            parameters[p + "conv.norm.weight"] = around(1, 0.2, width)
        parameters[t + "learnable_ttt_lr_weight"] = around(0, 0.1, heads, 1, width)
        parameters[t + "learnable_ttt_lr_bias"] = around(0, 0.5, heads, 1)
        # Some of the token scales are clamped at zero.
        parameters[t + "learnable_token_idx"] = around(0, 0.1, 16)
        parameters[t + "ttt_norm_weight"] = around(1, 0.2, heads, f)
        parameters[t + "ttt_norm_bias"] = around(0, 0.2, heads, f)
        for i, (rows, columns) in enumerate(pairwise(inner), start=1):
            parameters[f"{t}W{i}"] = around(0, 0.1, heads, rows, columns)
            parameters[f"{t}b{i}"] = around(0, 0.1, heads, 1, columns)
        parameters[t + "post_norm.weight"] = around(1, 0.2, width)
        parameters[t + "post_norm.bias"] = around(0, 0.1, width)
        parameters[p + "seq_norm.weight"] = around(1, 0.2, width)
        parameters[p + "ffn_norm.weight"] = around(1, 0.2, width)
        parameters[p + "mlp.gate_proj.weight"] = around(0, 0.15, ffn, width)
        parameters[p + "mlp.up_proj.weight"] = around(0, 0.15, ffn, width)
        parameters[p + "mlp.down_proj.weight"] = around(0, 0.15, width, ffn)
    return config, parameters


LAYOUTS = {
    "one": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "tp4": ["parallel.tensor_model_parallel_size=4"],
    "tp2sp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "pp2vpp2": [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ],
    "dp2": [],
    "tp2pp2": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
    ],
    "tp2sp_dp2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
}
PROCESSES = {"one": 1, "tp4": 4, "tp2pp2": 4, "tp2sp_dp2": 4}
"""Processes of a layout; 2 where it is not named."""


@dataclass
class Job:
    """Cases for the worker, gathered by number of processes, so that each job starts once."""

    folder: Path
    cases: dict[int, list[dict]] = field(default_factory=dict)

    def import_official(self, name: str, config, parameters) -> Path:
        """Let the first job of one process make a checkpoint of official weights."""
        source = write_official(self.folder / f"{name}.hf", config, parameters)
        output = self.folder / f"{name}.checkpoint"
        self.cases.setdefault(1, []).append({"import": str(source), "output": str(output)})
        return output

    def train(self, name: str, layout: str, recipe: dict, overrides=(), **wanted: bool) -> None:
        """Add a run of `recipe` (a configuration tree) at a layout; its folder is `name`.

        wanted: `gradients`, `moments` (see worker.py).
        """
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        run_dir = self.folder / name
        self.cases.setdefault(PROCESSES.get(layout, 2), []).append(
            {
                "train": [str(path)],
                "overrides": [*LAYOUTS[layout], f"run.dir={run_dir}", "run.device=cpu", *overrides],
                "output": str(run_dir / "result"),
                **wanted,
            }
        )

    def evaluate(
        self, name: str, layout: str, checkpoint: Path, ids: torch.Tensor, dtype, kind="evaluate"
    ) -> None:
        """Add an evaluation of a checkpoint at a layout, or another `kind` of case that takes the
        same; its folder is `name`."""
        path = self.folder / f"{name}.npy"
        np.save(path, ids.numpy())
        self.cases.setdefault(PROCESSES.get(layout, 2), []).append(
            {
                kind: str(checkpoint),
                "dtype": dtype,
                "overrides": [*LAYOUTS[layout], "run.device=cpu"],
                "input_ids": str(path),
                "output": str(self.folder / name / "result"),
            }
        )

    def run(self) -> None:
        """Run all cases, jobs of fewer processes first."""
        for processes in sorted(self.cases):
            path = self.folder / f"cases{processes}.json"
            path.write_text(json.dumps(self.cases[processes]))
            torchrun(processes, WORKER, path)

    def losses(self, name: str, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The losses and gradient norms of a run, step by step from `first`."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        assert [record["step"] for record in steps] == list(range(first, len(steps) + first))
        return tuple(np.array([record[key] for record in steps]) for key in ("loss", "grad_norm"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that the worker wrote for a case."""
        return load_file(self.folder / name / "result" / "result.safetensors")

    def facts(self, name: str) -> dict:
        """What the worker wrote about a run."""
        return json.loads((self.folder / name / "result" / "result.json").read_text())


def environment() -> dict[str, str]:
    """This process's environment, one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(processes: int, script: Path, *arguments) -> str:
    """Run a script under torchrun; its output, or an error that shows it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--standalone", str(script), *map(str, arguments)]
    return run(command)


def run(command: list, *, expect: int = 0) -> str:
    """Run a command; its output, or an error that shows it where the exit code is another."""
    # Into a file: a pipe would be held open by helper processes that a crashed rank leaves.
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.seek(0)
        output = log.read()
    assert done.returncode == expect, f"exit code {done.returncode} of {command}:\n{output[-6000:]}"
    return output


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of b."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
