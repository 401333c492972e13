"""Every layout trains the same model: each parameter's gradient, ten losses, ten gradient norms.

From weights that are all off their trivial initial values, in float32, with several gradient
buckets of which an inner one is padded.
"""

import numpy as np
import pytest
import torch
from harness import (
    LAYOUTS,
    Job,
    further,
    model_sections,
    one_here,
    random_official,
    relative,
    section,
)

MODELS = [
    ("linear", "mamba"),
    ("mlp", "mamba"),
    ("linear", "transformer"),
    ("mlp", "transformer"),
]
NAMES = [f"{kind}-{backbone}" for kind, backbone in MODELS]
HERE = [layout for layout in LAYOUTS if layout not in ("dp3", "dp4")]
"""Four sequences a step and two microbatches: for two data-parallel ranks."""
PARALLEL = HERE[1:]
# 97 entries: tensor-parallel ranks hold padding, of which neither loss nor gradients may know.
INITIAL = ["one", "tp2sp", "pp2vpp2", "tp2pp2"]
MOVED = ["tp2pp2", "tp4", "tp2sp_dp2"]
PADDED = ["tp2", "tp2sp", "tp4", "tp2pp2"]


def recipe_of(job, sections, checkpoint) -> dict:
    tokens = job.folder / "tokens.npy"
    random = np.random.default_rng(1)
    np.save(tokens, random.integers(0, 96, (10, 4, 65)))
    return {
        **sections,
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": 10,
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32",
        },
        "data": {"fixed_batches": str(tokens)},
        "checkpoint": {"load": checkpoint, "save_every": 0, "milestone_every": 0},
        "parallel": {"bucket_size": 15000},
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("layouts"))
    for (kind, backbone), name in zip(MODELS, NAMES):
        config, parameters = random_official(kind, backbone)
        checkpoint = job.import_official(name, config, parameters)
        recipe = recipe_of(job, model_sections(config), str(checkpoint))
        for layout in HERE:
            job.train(f"{name}-{layout}", layout, recipe, gradients=True)
    config, parameters = random_official("linear", "mamba", vocab=97)
    checkpoint = job.import_official("padded", config, parameters)
    recipe = recipe_of(job, model_sections(config), str(checkpoint))
    for layout in ["one", *PADDED]:
        job.train(f"padded-{layout}", layout, recipe, gradients=True)
    job.train("padded-recompute", "tp2sp", recipe, ["training.recompute=true"], gradients=True)
    # Half of the run at one layout, the other half at another.
    job.train("source", "tp2sp", recipe, ["training.exit_step=5"])
    for layout in MOVED:
        source = f"checkpoint.load={job.folder}/source/checkpoint-5"
        job.train(f"moved-{layout}", layout, recipe, [source], after="source")
    # Initial weights: the first step's learning rate is zero, so step 1 leaves them as they are.
    sections = model_sections(random_official("mlp", "mamba", vocab=97)[0])
    for layout in INITIAL:
        fresh = recipe_of(job, sections, "none")
        job.train(f"initial-{layout}", layout, fresh, ["training.exit_step=1"])
    return job


# TTT-Linear at every layout; of the others what differs: more states, another order of projections.
COMPARED = [(NAMES[0], layout) for layout in PARALLEL]
COMPARED += [(NAMES[1], layout) for layout in ("tp2sp", "pp2vpp2")]
COMPARED += [(name, "tp2sp") for name in NAMES[2:]]
COMPARED += [("padded", layout) for layout in ("tp4", "recompute")]
FURTHER = [(NAMES[1], layout) for layout in PARALLEL]
FURTHER += [(name, "tp2sp_dp2") for name in NAMES[2:]]
FURTHER += [("padded", layout) for layout in PADDED]
COMPARED += [further(case) for case in FURTHER if case not in COMPARED]


@pytest.mark.parametrize("name,layout", COMPARED)
def test_trains_the_model_of_one_process(job, name, layout):
    one, ours = job.tensors(f"{name}-one"), job.tensors(f"{name}-{layout}")
    gradients = section(one, "grad")
    assert len(gradients) > 50
    assert set(gradients) == set(section(ours, "grad"))
    for parameter, gradient in gradients.items():
        assert relative(ours[f"grad/{parameter}"], gradient) < 1e-5, parameter
    losses, grad_norms = job.losses(f"{name}-one")
    our_losses, our_grad_norms = job.losses(f"{name}-{layout}")
    assert len(our_losses) == 10
    assert np.abs(our_losses - losses).max() < 1e-5
    assert np.abs(our_grad_norms / grad_norms - 1).max() < 1e-4
    facts = job.facts(f"{name}-{layout}")
    assert facts["problems"] == []
    buckets = facts["buckets"][0]
    assert len(buckets) >= 3
    assert any(size < padded for size, padded in buckets[:-1]), buckets


@pytest.mark.parametrize("layout", one_here(INITIAL[1:]))
def test_initial_weights_do_not_depend_on_the_layout(job, layout):
    one, ours = job.tensors("initial-one"), job.tensors(f"initial-{layout}")
    for parameter, value in section(one, "param").items():
        assert torch.equal(ours[f"param/{parameter}"], value), parameter


@pytest.mark.parametrize("layout", one_here(MOVED))
def test_goes_on_at_another_layout(job, layout):
    losses, grad_norms = job.losses("padded-one")
    moved_losses, moved_grad_norms = job.losses(f"moved-{layout}", first=6)
    assert np.abs(moved_losses - losses[5:]).max() < 1e-5
    assert np.abs(moved_grad_norms / grad_norms[5:] - 1).max() < 1e-4
    whole, ours = job.tensors("padded-one"), job.tensors(f"moved-{layout}")
    for parameter, value in section(whole, "param").items():
        assert relative(ours[f"param/{parameter}"], value) < 1e-5, parameter
