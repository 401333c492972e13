"""The official models' logits, losses and gradients, through the megatron model.

float64 files: within 1e-9 relative, at one process and where parallelism cuts tensors and
sequences; JAX's float32 files: logits within 1e-5.
"""

import pytest
import torch.nn.functional as F
from harness import Job, read_golden, relative, section

FLOAT64 = [
    "linear_transformer",
    "mlp_transformer",
    "linear_mamba",
    "mlp_mamba",
    "linear_mamba_ragged",
    "mlp_mamba_ragged",
]
JAX = ["jax_linear_mamba", "jax_mlp_mamba"]
CASES = [(name, "one") for name in FLOAT64 + JAX]
# 56 tokens over two sequence-parallel ranks; 41 are not divisible.
CASES += [(name, "tp2sp") for name in FLOAT64 if name != "mlp_mamba_ragged"]
CASES += [("mlp_mamba_ragged", "tp2"), ("linear_mamba", "pp2")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("golden"))
    checkpoints = {}
    for name, layout in CASES:
        config, tensors = read_golden(name)
        if name not in checkpoints:
            checkpoints[name] = job.import_official(name, config, section(tensors, "param"))
        job.evaluate(f"{name}-{layout}", layout, checkpoints[name], tensors["input_ids"], "float64")
    return job


@pytest.mark.parametrize("name,layout", CASES)
def test_matches_the_official_model(job, name, layout):
    _, golden = read_golden(name)
    ours = job.tensors(f"{name}-{layout}")
    logits = ours["logits"]
    if name in JAX:
        assert relative(logits, golden["logits"]) < 1e-5
        return
    assert relative(logits, golden["logits"]) < 1e-9
    targets = golden["input_ids"][:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    assert abs(loss.item() / golden["loss"].item() - 1) < 1e-9
    gradients = section(golden, "grad")
    assert set(gradients) == set(section(ours, "grad"))
    for parameter, gradient in gradients.items():
        assert relative(ours[f"grad/{parameter}"], gradient) < 1e-9, parameter
