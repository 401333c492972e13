"""A mixer written outside the package: everything that the package's own mixers can."""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from harness import ROOT, Job, environment, model_sections, random_model, relative, run, section
from small_run import small_recipe

from megatron_ttt.config import load_config
from megatron_ttt.errors import UserError
from megatron_ttt.mixers import load_mixers
from megatron_ttt.mixers.ttt.linear import LINEAR
from megatron_ttt.mixers.ttt.reference import expand_state, reference_scan

MODULE = "examples.custom_mixer.momentum_ttt"
STEPS, SAVED_AT = 6, 3


def test_everything_a_mixer_can(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_TTT_MIXERS", MODULE)  # for commands that read a checkpoint
    load_mixers()
    model = {"num_layers": 2, "mixer_modules": [MODULE]}
    config, parameters = random_model(["momentum_ttt"], **model)
    job = Job(tmp_path)
    checkpoint = job.import_official("imported", config, parameters)
    tokens = np.random.default_rng(1).integers(0, 96, (STEPS, 4, 43))
    recipe = job.recipe(model_sections(config), tokens, checkpoint)

    # It trains at TP2 + SP, is resumed there at PP2, and is the model of one process throughout.
    job.train("one", "one", recipe, gradients=True)
    exit_step = [f"training.exit_step={SAVED_AT}"]
    job.train("tp2sp", "tp2sp", recipe, exit_step, gradients=True)
    load = [f"checkpoint.load={tmp_path}/tp2sp/checkpoint-{SAVED_AT}"]
    job.train("pp2", "pp2", recipe, load, after="tp2sp")
    one, ours = job.tensors("one"), job.tensors("tp2sp")
    gradients = section(one, "grad")
    assert any(name.endswith("decay_logit") for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert relative(ours[f"grad/{name}"], gradient) < 1e-5, name
    losses, _ = job.losses("one")
    assert np.abs(job.losses("tp2sp")[0] - losses[:SAVED_AT]).max() < 1e-5
    assert np.abs(job.losses("pp2", first=SAVED_AT + 1)[0] - losses[SAVED_AT:]).max() < 1e-5
    trained = tmp_path / f"pp2/checkpoint-{STEPS}"

    # It exports, loads in transformers and comes back.
    convert = [sys.executable, "tools/convert_checkpoint.py"]
    run([*convert, "export", "--checkpoint", trained, "--output", tmp_path / "hf"])
    run([*convert, "import", "--hf", tmp_path / "hf", "--output", tmp_path / "again"])
    run([*convert, "export", "--checkpoint", tmp_path / "again", "--output", tmp_path / "hf2"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "hf2")]
    assert weights[0] == weights[1]
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float64
    ).eval()

    # It evaluates at another layout, to what transformers computes.
    ids = torch.from_numpy(tokens[0][:, :42])
    job.evaluate("logits", "tp2", trained, ids, "float64")
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits
        assert relative(job.tensors("logits")["logits"], logits) < 1e-6
        # Token by token from a prompt that ends within a mini-batch.
        output = theirs(ids[:, :21], use_cache=True)
        parts = [output.logits]
        for column in range(21, 42):
            past = output.past_key_values
            output = theirs(ids[:, column : column + 1], past_key_values=past, use_cache=True)
            parts.append(output.logits)
        assert relative(torch.cat(parts, dim=1), logits) < 1e-9

    # It generates.
    np.save(tmp_path / "prompt.npy", tokens[0][:, :21])
    run(
        [
            *(sys.executable, "tools/generate.py", "--checkpoint", trained, "--greedy"),
            *("--prompt-ids", tmp_path / "prompt.npy", "--max-new-tokens", 6),
            *("--save-ids", tmp_path / "generated.npy", "run.device=cpu"),
        ]
    )
    generated = torch.from_numpy(np.load(tmp_path / "generated.npy"))
    assert generated.shape[1] in (6, 27)
    expected = theirs.generate(ids[:, :21], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated[:, -6:], expected[:, -6:])


def test_the_recipe_trains(tmp_path):
    recipe = ROOT / "examples/custom_mixer/recipe.yaml"
    config = load_config([recipe])
    assert config.model.pattern == ["momentum_ttt"]
    assert config.mixers["momentum_ttt"].momentum == 0.5
    overrides = [part for part in small_recipe(tmp_path) if "=" in str(part)]
    command = [sys.executable, "pretrain_ttt.py", "--config", recipe, *overrides]
    run([*command, f"run.dir={tmp_path}/run"])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses and all(loss > 0 for loss in losses)


def test_an_installed_package_brings_its_mixer(tmp_path):
    """By an entry point: the recipe names no module."""
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    entry = "[megatron_ttt.mixers]\nmomentum_ttt = {}:{}\n"
    command = ["pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml", "--print-config"]
    command = [sys.executable, *command, "model.pattern=momentum_ttt"]
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    (info / "entry_points.txt").write_text(entry.format(MODULE, "MOMENTUM_TTT"))
    assert "decay: " in run(command, env=env, forked=False)
    (info / "entry_points.txt").write_text(entry.format(MODULE, "NONE"))
    output = run(command, env=env, forked=False, expect=2)
    assert "error: the mixer momentum_ttt of an installed package cannot be loaded" in output


def test_the_estimate_of_memory_is_what_autograd_saves():
    load_mixers([MODULE])
    from examples.custom_mixer.momentum_ttt import MOMENTUM, MOMENTUM_TTT, momentum_mini_batch
    from megatron_ttt.mixers.base import Dimensions, Microbatch

    random, options = torch.Generator().manual_seed(0), MOMENTUM_TTT.Options()
    B, H, L, F, K = 2, 2, 320, 64, options.mini_batch_size

    def leaf(*shape):
        return torch.randn(shape, generator=random).requires_grad_()

    rates = leaf(H, 1, 1).sigmoid(), leaf(H, 1, 1).sigmoid()
    inputs = (*(leaf(B, H, L, F) for _ in range(3)), leaf(B, H, L), leaf(K))
    inputs = (*inputs, leaf(H, F), leaf(H, F))
    state = tuple(leaf(H, *shape) for shape in MOMENTUM.state_shapes(F).values())
    given, saved = {x.untyped_storage().data_ptr() for x in (*inputs, *state)}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    model = replace(MOMENTUM, mini_batch=partial(momentum_mini_batch, *rates))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reference_scan(model, *inputs, expand_state(state, inputs))
    measured = sum(storage.nbytes() for at, storage in saved.items() if at not in given)
    batch = Microbatch(B, L, Dimensions(H * F, H, 0.02), 4, 1, False, True, "auto")
    assert abs(MOMENTUM_TTT.saved_state_bytes(options, batch) / measured - 1) < 0.1


def test_options_out_of_range_are_refused():
    recipe = ROOT / "examples/custom_mixer/recipe.yaml"
    with pytest.raises(UserError, match=r"mixers\.momentum_ttt\.decay must be between 0 and 1"):
        load_config([recipe], ["mixers.momentum_ttt.decay=1.0"])


def test_without_momentum_and_decay_it_is_ttt_linear():
    load_mixers([MODULE])
    from examples.custom_mixer.momentum_ttt import MOMENTUM, momentum_mini_batch

    random = torch.Generator().manual_seed(0)
    B, H, L, F, K = 2, 3, 41, 8, 16

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = (*normal(3, B, H, L, F), normal(B, H, L).sigmoid() / F, normal(K).abs())
    inputs = (*inputs, *normal(2, H, F))
    W, b = 0.1 * normal(H, F, F), 0.1 * normal(H, 1, F)
    state = (W, b, torch.zeros_like(W), torch.zeros_like(b))

    def scan(momentum: float, decay: float):
        rates = (torch.full((H, 1, 1), rate, dtype=torch.float64) for rate in (momentum, decay))
        model = replace(MOMENTUM, mini_batch=partial(momentum_mini_batch, *rates))
        return reference_scan(model, *inputs, expand_state(state, inputs))

    linear, (linear_W, _) = reference_scan(LINEAR, *inputs, expand_state((W, b), inputs))
    output, (plain_W, *_) = scan(0.0, 0.0)
    assert relative(output, linear) < 1e-12 and relative(plain_W, linear_W) < 1e-12
    assert relative(scan(0.5, 0.0)[0], linear) > 1e-3
    assert relative(scan(0.0, 0.5)[0], linear) > 1e-3
