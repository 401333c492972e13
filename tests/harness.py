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
import pytest
import torch
import yaml
from prefork import ForkedPopen, ensure_server
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


def model_sections(config: dict[str, Any]) -> dict[str, Any]:
    """The recipe's sections `model` and `mixers` for an official config."""
    from megatron_ttt.hf.configuration import architecture_from_hf_config

    return architecture_from_hf_config(config).to_tree()


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


def random_model(
    pattern: list[str],
    mixers: dict[str, dict[str, Any]] | None = None,
    *,
    seed=0,
    **model: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A config.json and parameters of a small model, off their initial values, by the mixers' own
    tables. mixers: options that are not the defaults. model: other fields of its section."""
    from megatron_ttt.config import ModelConfig
    from megatron_ttt.hf.configuration import hf_config_of
    from megatron_ttt.hf.mapping import split
    from megatron_ttt.mixers import MIXERS
    from megatron_ttt.stack import Architecture

    sizes = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 96}
    section = ModelConfig(pattern=pattern, **{**sizes, "vocab_size": 96, **model})
    options = {name: MIXERS[name].Options(**(mixers or {}).get(name, {})) for name in pattern}
    architecture = Architecture(section, options)
    random, parameters = torch.Generator().manual_seed(seed), {}
    for row in architecture.parameters().values():
        tensor = torch.empty(row.shape)
        row.initialiser(tensor, random)
        tensor += 0.15 * torch.randn(row.shape, generator=random)
        parameters |= {name: part.clone() for name, part in split(row, tensor)}
    return hf_config_of(architecture), parameters


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
    "dp3": [],
    "dp4": [],
    "tp2pp2": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
    ],
    "tp2sp_dp2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
}
PROCESSES = {"one": 1, "dp3": 3, "dp4": 4, "tp4": 4, "tp2pp2": 4, "tp2sp_dp2": 4}
"""Processes of a layout; 2 where it is not named."""


def one_here(cases: list) -> list:
    """Parameters of a test of which all but the first are marked as `matrix`."""
    return [cases[0], *(further(case) for case in cases[1:])]


def further(case):
    """A parameter, or a tuple of them, that is marked as `matrix`."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.matrix)


@dataclass
class Job:
    """Cases for the worker, by name. A case is run when first asked for what it wrote."""

    folder: Path
    _cases: dict[str, list[tuple[int, dict]]] = field(default_factory=dict)
    _after: dict[str, str] = field(default_factory=dict)

    def import_official(self, name: str, config, parameters) -> Path:
        """Make a checkpoint of official weights."""
        source = write_official(self.folder / f"{name}.hf", config, parameters)
        output = self.folder / f"{name}.checkpoint"
        self._add(name, 1, {"import": str(source), "output": str(output)})
        self.run(name)
        return output

    def recipe(
        self, sections: dict, tokens: np.ndarray, checkpoint: Path, **optimizer: float
    ) -> dict[str, Any]:
        """A configuration tree that trains a checkpoint in fp32 on tokens [steps, batch, L+1], two
        sequences a microbatch, and saves at the end."""
        path = self.folder / "tokens.npy"
        np.save(path, tokens)
        steps, batch, columns = tokens.shape
        return {
            **sections,
            "optimizer": {"lr": 3e-3, **optimizer},
            "training": {
                "steps": steps,
                "seq_length": columns - 1,
                "micro_batch_size": 2,
                "global_batch_size": batch,
                "precision": "fp32",
            },
            "data": {"fixed_batches": str(path)},
            "checkpoint": {"load": str(checkpoint), "save_every": 0, "milestone_every": 0},
        }

    def train(
        self,
        name: str,
        layout: str,
        recipe: dict,
        overrides=(),
        *,
        after: str | None = None,
        **wanted: bool,
    ) -> None:
        """Add a run of `recipe` (a configuration tree) at a layout; its folder is `name`.

        A name that is given again is the run's next part. after: a case that runs before this one.
        wanted: `gradients`, `moments` (see worker.py).
        """
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        run_dir = self.folder / name
        overrides = [*LAYOUTS[layout], f"run.dir={run_dir}", "run.device=cpu", *overrides]
        case = {"train": [str(path)], "overrides": overrides, "output": str(run_dir / "result")}
        self._add(name, PROCESSES.get(layout, 2), {**case, **wanted})
        if after:
            self._after[name] = after

    def evaluate(
        self, name: str, layout: str, checkpoint: Path, ids: torch.Tensor, dtype, kind="evaluate"
    ) -> None:
        """Add an evaluation of a checkpoint at a layout, or another `kind` of case that takes the
        same; its folder is `name`."""
        path = self.folder / f"{name}.npy"
        np.save(path, ids.numpy())
        case = {
            kind: str(checkpoint),
            "dtype": dtype,
            "overrides": [*LAYOUTS[layout], "run.device=cpu"],
            "input_ids": str(path),
            "output": str(self.folder / name / "result"),
        }
        self._add(name, PROCESSES.get(layout, 2), case)

    def _add(self, name: str, processes: int, case: dict) -> None:
        self._cases.setdefault(name, []).append((processes, case))

    def run(self, name: str) -> Path:
        """Run a case unless it was run; its folder."""
        if name in self._after:
            self.run(self._after[name])
        for number, (processes, case) in enumerate(self._cases[name]):
            path = self.folder / f"{name}-case{number}.json"
            path.write_text(json.dumps(case))
            torchrun(processes, WORKER, path)
        self._cases[name] = []
        return self.folder / name

    def losses(self, name: str, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The losses and gradient norms of a run, step by step from `first`."""
        lines = (self.run(name) / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        assert [record["step"] for record in steps] == list(range(first, len(steps) + first))
        return tuple(np.array([record[key] for record in steps]) for key in ("loss", "grad_norm"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that the worker wrote for a case."""
        return load_file(self.run(name) / "result" / "result.safetensors")

    def facts(self, name: str) -> dict:
        """What the worker wrote about a run."""
        return json.loads((self.run(name) / "result" / "result.json").read_text())


def environment() -> dict[str, str]:
    """This process's environment, one thread a process; examples can be imported."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    return {**os.environ, **settings}


def torchrun(processes: int, script: Path, *arguments, **options) -> str:
    """Run a script as one job of so many processes; its output, or an error that shows it.

    options: those of `start`.
    """
    return run([sys.executable, script, *arguments], ranks=processes, **options)


def start(
    command: list,
    stdout,
    stderr=None,
    *,
    ranks: int | None = None,
    forked: bool = True,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start a command that writes to open files, by default both streams to one.

    What Python would run, or torchrun as a job of so many `ranks`, is forked from a process that
    has imported it (see prefork.py). With `forked` false, Python or torchrun is started.
    """
    ensure_server()
    command = [str(part) for part in command]
    options = {"cwd": cwd, "env": env or environment(), "stderr": stderr or stdout}
    if not forked:
        if ranks:
            job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command[1:1] = job
        return subprocess.Popen(command, stdout=stdout, **options)
    return ForkedPopen(command, ranks=ranks, stdout=stdout, **options)


def run(command: list, *, expect: int = 0, **options) -> str:
    """Run a command; its output, or an error that shows it where the exit code is another.

    options: those of `start`.
    """
    # Into a file: a pipe would be held open by helper processes that a crashed rank leaves.
    with tempfile.TemporaryFile("w+") as log:
        code = start(command, log, **options).wait()
        log.seek(0)
        output = log.read()
    assert code == expect, f"exit code {code} of {command}:\n{output[-6000:]}"
    return output


def finish(command: list, **options) -> subprocess.CompletedProcess:
    """Run a command; its exit code and what it wrote to each stream.

    options: those of `start`.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        code = start(command, out, error, **options).wait()
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of b."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
