"""The TTT layer's three switches in all combinations, from a directory to a run to a directory."""

import itertools
import json

import numpy as np
import pytest
import torch
from harness import Job, further, model_sections, random_model, relative
from safetensors.torch import load_file

from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.loading import load_directory

SWITCHES = ("use_gate", "share_qk", "pre_conv")
COMBINATIONS = list(itertools.product([True, False], repeat=3))
# What the layouts' tests do not have: some of the switches.
MIXED = [values for values in COMBINATIONS if len(set(values)) > 1]
CASES = [*MIXED[1:3], *(further(values) for values in MIXED if values not in MIXED[1:3])]
CASES = [case if hasattr(case, "marks") else pytest.param(*case) for case in CASES]


@pytest.mark.parametrize("use_gate,share_qk,pre_conv", CASES)
def test_imports_trains_and_exports(tmp_path, use_gate, share_qk, pre_conv):
    switches = dict(zip(SWITCHES, (use_gate, share_qk, pre_conv)))
    config, parameters = random_model(["ttt_linear"], {"ttt_linear": switches}, num_layers=2)
    assert {name: config[name] for name in SWITCHES} == switches
    job = Job(tmp_path)
    checkpoint = job.import_official("imported", config, parameters)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 96, (3, 2, 34))
    recipe = job.recipe(model_sections(config), tokens, checkpoint, lr=1e-3)
    job.train("run", "tp2", recipe)
    trained = job.run("run") / "checkpoint-3"
    export_checkpoint(trained, tmp_path / "hf")
    exported = json.loads((tmp_path / "hf/config.json").read_text())
    assert {name: exported[name] for name in SWITCHES} == switches
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert weights.keys() == parameters.keys()
    assert all(relative(weights[name], parameters[name]) > 0 for name in parameters)

    ids = torch.from_numpy(random.integers(0, 96, (2, 33)))
    job.evaluate("logits", "tp2", trained, ids, "float64")
    theirs = load_directory(tmp_path / "hf", torch.float64)(ids).logits
    assert relative(job.tensors("logits")["logits"], theirs) < 1e-6
