"""A checkpoint of any layout, taken up at any other: the same moments, then the same losses."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from harness import Job, further, model_sections, one_here, random_official, relative, section

MATRIX = ["one", "tp2pp2", "dp2", "tp2", "pp2", "dp3", "dp4"]
RING = list(pairwise([*MATRIX, MATRIX[0]]))
"""What is written depends on the source alone, and what is read on the target, whose parts of it
tests/test_boxes.py draws at random: so each layout stands twice on either side, not six times."""
FIRST_TIER = [("pp2", "dp3", "fp32"), ("dp3", "pp2", "bf16")]
CASES = [(*pair, "fp32") for pair in RING]
CASES += [(target, source, "bf16") for source, target in RING]
MICRO_BATCH = {"dp3": 2}
SAVED_AT, STEPS = 5, 15
LOSSES = {"fp32": 1e-5, "bf16": 0.02}
"""What the next losses may differ by. Layouts add up in another order, which bf16 rounds."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs that save, and runs that go on from what was saved."""
    job = Job(tmp_path_factory.mktemp("saving"))
    tokens = job.folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(1).integers(0, 97, (STEPS, 12, 33)))
    # 97 entries: the embedding is padded under tensor parallelism.
    config, parameters = random_official("linear", "mamba", layers=2, width=32, ffn=48, vocab=97)
    checkpoint = job.import_official("initial", config, parameters)
    for precision in LOSSES:
        recipe = {
            **model_sections(config),
            "optimizer": {"lr": 3e-3},
            "training": {
                "steps": STEPS,
                "seq_length": 32,
                "global_batch_size": 12,
                "precision": precision,
            },
            "data": {"fixed_batches": str(tokens)},
            "checkpoint": {"load": str(checkpoint), "save_every": 0, "milestone_every": 0},
            "parallel": {"bucket_size": 4000},
        }
        job.train(f"whole-{precision}", "one", recipe, [micro_batch("one")])
        exit_step = f"training.exit_step={SAVED_AT}"
        for source in MATRIX:
            options = [exit_step, micro_batch(source)]
            job.train(f"{source}-{precision}", source, recipe, options, moments=True)
        pairs = [case[:2] for case in CASES if case[2] == precision]
        for source, target in pairs:
            after = f"{source}-{precision}"
            load = f"checkpoint.load={job.folder}/{after}/checkpoint-{SAVED_AT}"
            name = f"{source}-{target}-{precision}"
            options = [load, micro_batch(target)]
            job.train(name, target, recipe, options, moments=True, after=after)
    return job


def micro_batch(layout: str) -> str:
    """An override: what divides the sequences of a rank, as many as there can be."""
    return f"training.micro_batch_size={MICRO_BATCH.get(layout, 3)}"


def in_tiers(cases: list) -> list:
    return [case if case in FIRST_TIER else further(case) for case in cases]


@pytest.mark.parametrize("source,target,precision", in_tiers(CASES))
def test_taken_up_at_another_layout(job, source, target, precision):
    name = f"{source}-{target}-{precision}"
    saved, loaded = job.tensors(f"{source}-{precision}"), job.tensors(name)
    moments = section(saved, "last")
    assert len(moments) > 2 * 20 and job.facts(name)["problems"] == []
    assert any(len(buffer) > 2 for buffer in job.facts(name)["buckets"])
    for moment, value in moments.items():
        assert value.abs().max() > 0, moment
        assert torch.equal(loaded[f"first/{moment}"], value), moment
    losses, grad_norms = job.losses(f"whole-{precision}")
    our_losses, our_grad_norms = job.losses(name, first=SAVED_AT + 1)
    assert len(our_losses) == STEPS - SAVED_AT == 10
    assert np.abs(our_losses - losses[SAVED_AT:]).max() < LOSSES[precision]
    if precision == "fp32":
        assert np.abs(our_grad_norms / grad_norms[SAVED_AT:] - 1).max() < 1e-4


@pytest.mark.parametrize("source", one_here(MATRIX[1:]))
def test_moments_are_those_of_one_process(job, source):
    one, ours = job.tensors("one-fp32"), job.tensors(f"{source}-fp32")
    for moment, value in section(one, "last").items():
        assert relative(ours[f"last/{moment}"], value) < 1e-4, moment
