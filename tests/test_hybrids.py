"""Models of several mixers: at every layout the model of one process, at any layout taken up again.

In float32, from weights that are all off their initial values, an untied head among them.
"""

import numpy as np
import pytest
from harness import Job, further, model_sections, random_model, relative, section

HYBRIDS = {
    "3to1": (
        ["ttt_linear", "ttt_linear", "ttt_linear", "attention"],
        {"attention": {"window": 8, "num_kv_heads": 2}},
        {"tie_word_embeddings": False},
    ),
    "1to1": (["ttt_mlp", "attention"], {"ttt_mlp": {"base_lr": 0.1}}, {}),
}
PARALLEL = ["tp2", "tp2sp", "pp2", "pp2vpp2", "dp2"]
SAVED_AT, STEPS = 4, 8
# What is written depends on the layout that saves, what is read on the one that loads.
PAIRS = list(zip(PARALLEL, [*PARALLEL[1:], PARALLEL[0]]))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("hybrids"))
    tokens = np.random.default_rng(1).integers(0, 97, (STEPS, 4, 43))
    for name, (pattern, mixers, model) in HYBRIDS.items():
        config, parameters = random_model(pattern, mixers, vocab_size=97, **model)
        checkpoint = job.import_official(name, config, parameters)
        recipe = job.recipe(model_sections(config), tokens, checkpoint)
        recipe["parallel"] = {"bucket_size": 15000}
        job.train(f"{name}-one", "one", recipe, gradients=True)
        for layout in PARALLEL:
            options = [f"training.exit_step={SAVED_AT}"]
            job.train(f"{name}-{layout}", layout, recipe, options, gradients=True)
        for source, target in PAIRS:
            load = f"checkpoint.load={job.folder}/{name}-{source}/checkpoint-{SAVED_AT}"
            after = f"{name}-{source}"
            job.train(f"{name}-{source}-{target}", target, recipe, [load], after=after)
    return job


def in_tiers(cases: list, first: list) -> list:
    return [case if case in first else further(case) for case in cases]


CASES = [(name, layout) for name in HYBRIDS for layout in PARALLEL]
FIRST = [("3to1", "tp2sp"), ("1to1", "pp2vpp2")]


@pytest.mark.parametrize("name,layout", in_tiers(CASES, FIRST))
def test_trains_the_model_of_one_process(job, name, layout):
    one, ours = job.tensors(f"{name}-one"), job.tensors(f"{name}-{layout}")
    gradients = section(one, "grad")
    assert len(gradients) > 40
    assert set(gradients) == set(section(ours, "grad"))
    for parameter, gradient in gradients.items():
        assert relative(ours[f"grad/{parameter}"], gradient) < 1e-5, parameter
    losses, grad_norms = job.losses(f"{name}-one")
    our_losses, our_grad_norms = job.losses(f"{name}-{layout}")
    assert np.abs(our_losses - losses[:SAVED_AT]).max() < 1e-5
    assert np.abs(our_grad_norms / grad_norms[:SAVED_AT] - 1).max() < 1e-4
    assert job.facts(f"{name}-{layout}")["problems"] == []


CASES = [(name, *pair) for name in HYBRIDS for pair in PAIRS]


@pytest.mark.parametrize("name,source,target", in_tiers(CASES, [("3to1", "tp2sp", "pp2")]))
def test_goes_on_at_another_layout(job, name, source, target):
    losses, grad_norms = job.losses(f"{name}-one")
    moved = f"{name}-{source}-{target}"
    our_losses, our_grad_norms = job.losses(moved, first=SAVED_AT + 1)
    assert np.abs(our_losses - losses[SAVED_AT:]).max() < 1e-5
    assert np.abs(our_grad_norms / grad_norms[SAVED_AT:] - 1).max() < 1e-4
    for parameter, value in section(job.tensors(f"{name}-one"), "param").items():
        assert relative(job.tensors(moved)[f"param/{parameter}"], value) < 1e-5, parameter
