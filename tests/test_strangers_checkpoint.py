"""A checkpoint from elsewhere runs no code and learns no secret, whatever it holds."""

import json
import os
import pickle
import shutil
import sys
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT
from torch.distributed.checkpoint import FileSystemReader

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_manifest
from megatron_ttt.checkpoint.reader import read_metadata
from megatron_ttt.errors import UserError, run_command

sys.path.insert(0, str(ROOT / "tools"))
import checkpoint as checkpoint_tool
import convert_checkpoint
import evaluate
import generate

OBJECT = "decoder.layers.self_attention.in_proj._extra_state/shard_0_2"
TENSOR = "decoder.final_layernorm.weight"


class Code:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def sign(folder: Path) -> None:
    """Write the checksums of what is there."""
    write_manifest(folder, {name: describe(folder / name) for name in folder_files(folder)})


def in_metadata(folder: Path, code: Code) -> Path:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = code
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder / ".metadata"


def in_entry(name: str, folder: Path, code: Code) -> Path:
    """In the bytes of an entry, which is a pickle."""
    metadata = FileSystemReader(folder).read_metadata()
    torch.save([code], folder / "more.distcp")
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path, place.offset = "more.distcp", 0
            place.length = (folder / "more.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder / "more.distcp"


def in_common_state(folder: Path, code: Code) -> Path:
    torch.save({"optimizer": code}, folder / "common.pt")
    return folder / "common.pt"


@pytest.fixture(scope="module")
def honest(build_trainer, tmp_path_factory) -> Path:
    """A run of one step, and ids.npy."""
    folder = tmp_path_factory.mktemp("honest")
    np.save(folder / "ids.npy", np.arange(6).reshape(1, 6))
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 96, (1, 2, 33)))
    build_trainer(*options(folder), f"run.dir={folder}/run").train()
    return folder


def options(folder: Path) -> list[str]:
    data = ["data.train=[]", "data.validation=[]", "data.tokenizer_model=null"]
    model = {"hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 48, "vocab_size": 96}
    training = {"seq_length": 32, "global_batch_size": 2, "steps": 1}
    return [
        *data,
        *(f"model.{key}={value}" for key, value in model.items()),
        *(f"training.{key}={value}" for key, value in training.items()),
        f"data.fixed_batches={folder}/tokens.npy",
    ]


@pytest.fixture
def commands(honest, cpu_platform, build_trainer, monkeypatch, tmp_path):
    """The commands that read a checkpoint, in this process; each returns its exit code."""
    monkeypatch.setattr("megatron_ttt.process.prepare_process", lambda config: cpu_platform)

    def tool(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        return run_command(main)

    def train(checkpoint):
        load = [f"checkpoint.load={checkpoint}", f"run.dir={tmp_path}/again"]
        return run_command(lambda: build_trainer(*options(honest), *load) and 0)

    def evaluation(checkpoint):
        ids = ["--input-ids", honest / "ids.npy", "--save-logits", tmp_path / "logits.npy"]
        return tool(evaluate.main, "--checkpoint", checkpoint, *ids, "run.device=cpu")

    def generation(checkpoint):
        prompt = ["--prompt-ids", honest / "ids.npy", "--max-new-tokens", 1, "run.device=cpu"]
        return tool(generate.main, "--checkpoint", checkpoint, *prompt)

    def export(checkpoint):
        output = ["--output", tmp_path / "hf"]
        return tool(convert_checkpoint.main, "export", "--checkpoint", checkpoint, *output)

    return {
        "inspect": partial(tool, checkpoint_tool.main, "inspect"),
        "evaluate": evaluation,
        "export": export,
        "generate": generation,
        "training": train,
    }


@pytest.mark.parametrize(
    "place",
    [in_metadata, partial(in_entry, OBJECT), partial(in_entry, TENSOR), in_common_state],
    ids=["metadata", "object", "tensor", "common"],
)
def test_its_code_is_not_run(place, honest, commands, tmp_path, capsys):
    folder, made = tmp_path / "checkpoint-1", tmp_path / "made"
    shutil.copytree(honest / "run/checkpoint-1", folder)
    file = place(folder, Code(made))
    sign(folder)
    for name, command in commands.items():
        exit_code = command(folder)
        assert not made.exists(), name
        assert exit_code == 2, name
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"{file} asks for posix.mkdir" in said[0], (name, said)


class ByName(pickle.Pickler):
    """Pickles enumerations as Python 3.11.0 to 3.11.3 does, by `getattr`."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(honest, tmp_path):
    written = FileSystemReader(honest / "run/checkpoint-1").read_metadata()
    with open(tmp_path / ".metadata", "wb") as file:
        ByName(file).dump(written)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    found = read_metadata(tmp_path)
    assert found.state_dict_metadata == written.state_dict_metadata
    # Of another class than an enumeration nothing is got.
    method = pickle.dumps(Got(type(written), "__init__"))
    (tmp_path / ".metadata").write_bytes(method)
    with pytest.raises(UserError, match=r"asks for builtins\.getattr"):
        read_metadata(tmp_path)


class Got:
    """An attribute of a class, when it is unpickled."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_verify_says_what_checksums_are(honest, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", "verify", str(honest / "run")])
    assert checkpoint_tool.main() == 0
    good, meaning = capsys.readouterr().out.splitlines()
    assert good.endswith("checkpoint-1: good") and "not who wrote them" in meaning


def test_its_configuration_is_plain_data(honest, commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECRET", "my-password")
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(honest / "run/checkpoint-1", folder)
    state = json.loads((folder / "state.json").read_text())
    state["config"]["data"] |= {"train": ["${oc.env:SECRET}"], "fixed_batches": "${oc.env:SECRET}"}
    state["config"]["mixers"]["ttt_linear"]["rope_theta"] = 500.0
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)
    assert commands["export"](folder) == 0
    for file in (tmp_path / "hf").iterdir():
        assert b"my-password" not in file.read_bytes(), file
    assert "${oc.env:SECRET}" in (tmp_path / "hf/README.md").read_text()
    # Where a number belongs, it is refused instead.
    state["config"]["mixers"]["ttt_linear"]["rope_theta"] = "${oc.env:SECRET}"
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)
    shutil.rmtree(tmp_path / "hf")
    assert commands["export"](folder) == 2
    said = capsys.readouterr().err
    assert (
        "mixers.ttt_linear.rope_theta" in said
        and "my-password" not in said
        and said.count("\n") == 1
    )
