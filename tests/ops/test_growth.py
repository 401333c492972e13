"""Gradients where the inner state grows by orders of magnitude within a few mini-batches.

A gamma of 100 takes the state to some thousand times its size in the first mini-batch. No state
before that can be had back from one after it: float32's rounding of the larger is as large.
"""

import pytest
import torch
from harness import relative
from test_scan import NAMES, inputs, needs_cpp, run

from megatron_ttt.mixers.ttt import workspace

BOUND = {"linear": 1e-5, "mlp": 1e-3}  # the naive form, in float32: 1e-6 and up to 1e-4
FAST = ("torch", pytest.param("cpp", marks=needs_cpp))


def grown(kind, gamma, quiet=0, **sizes):
    """Inputs of 20 mini-batches and a ragged one; the state stays as it is for `quiet` tokens."""
    tensors = inputs(kind, 1, 3, 16 * 20 + 5, 16, 16, dtype=torch.float32, **sizes)
    with torch.no_grad():
        tensors[5].mul_(gamma)
        tensors[3][:, :, :quiet].mul_(1e-9)
    return tensors


def check(kind, tensors, backend, bound):
    """All gradients against the naive form's in float64."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    _, expected, upstream = run(kind, exact, "naive")
    _, gradients, _ = run(kind, tensors, backend, [x.float() for x in upstream])
    names = [*NAMES, *(f"state {i}" for i in range(len(tensors) - 7))]
    errors = {n: relative(a, b) for n, a, b in zip(names, gradients, expected)}
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("gamma", [100, 1000])
def test_at_once(kind, gamma, backend):
    check(kind, grown(kind, gamma, seed=gamma, per_batch=True), backend, BOUND[kind])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("quiet", [3 * 16, 17 * 16])
def test_later_in_a_group(kind, quiet, backend):
    """In the middle of the first group and of another."""
    check(kind, grown(kind, 1000, quiet, seed=0), backend, BOUND[kind])


def test_without_the_host_knowing_whether_it_grew(monkeypatch):
    """What PyTorch's TTT-MLP does on a GPU, where it would have to wait to know."""
    monkeypatch.setattr(workspace, "GROWTH", 0)
    tensors = inputs("mlp", 2, 2, 16 * 20 + 5, 16, 16, seed=0)
    _, expected, upstream = run("mlp", tensors, "naive")
    _, gradients, _ = run("mlp", tensors, "torch", upstream)
    for ours, theirs in zip(gradients, expected):
        assert relative(ours, theirs) < 1e-12
