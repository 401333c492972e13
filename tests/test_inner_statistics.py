"""The inner loop's statistics: the official JAX trainer's, at every layout, and as defined."""

import json
import sys

import pytest
import torch
from harness import Job, read_golden, relative, run, section

from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan
from megatron_ttt.mixers.ttt.statistics import inner_statistics

LAYOUTS = {
    "jax_linear_mamba": ["one", "tp2sp", "pp2", "dp2"],
    "jax_mlp_mamba": ["one", "tp2", "pp2"],
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("statistics"))
    for name, layouts in LAYOUTS.items():
        config, tensors = read_golden(name)
        checkpoint = job.import_official(name, config, section(tensors, "param"))
        for layout in layouts:
            ids = tensors["input_ids"]
            job.evaluate(f"{name}-{layout}", layout, checkpoint, ids, "float32", kind="statistics")
    return job


@pytest.mark.parametrize("name,layout", [(n, layout) for n in LAYOUTS for layout in LAYOUTS[n]])
def test_matches_the_official_trainer(job, name, layout):
    _, tensors = read_golden(name)
    golden, ours = section(tensors, "stats"), job.tensors(f"{name}-{layout}")
    layers = 1 + max(int(key.split("/")[0]) for key in golden)
    assert len(golden) == 4 * layers
    for key, expected in golden.items():
        layer, field = key.split("/")
        assert ours[field].shape == (layers, 8)
        assert relative(ours[field][int(layer)], expected) < 1e-4, key
        assert (ours[field][int(layer)] - expected).abs().max() < 1e-4, key
    for field, values in job.tensors(f"{name}-one").items():
        assert torch.allclose(ours[field], values, rtol=1e-5, atol=1e-7), field
    assert (ours["finite"] == 1).all()


def test_the_table_of_a_checkpoint(job):
    name = "jax_linear_mamba"
    command = [sys.executable, "tools/evaluate.py", "--inner-loop", "run.device=cpu"]
    command += ["--checkpoint", job.folder / f"{name}.checkpoint", "--dtype", "float32"]
    *_, header, first, second, figures = run(
        [*command, "--input-ids", job.folder / f"{name}-one.npy"]
    ).splitlines()
    assert header.startswith("layer") and first.split()[0] == "1" and second.split()[0] == "2"
    statistics, figures = job.tensors(f"{name}-one"), json.loads(figures)
    for field, values in statistics.items():
        for layer, value in enumerate(values, start=1):
            seen = figures[f"inner/layer_{layer:02d}/{field}"]
            assert seen == pytest.approx(value.mean().item(), rel=1e-4), (field, layer)
    assert f"{figures['inner/layer_02/loss_after']:.4g}" in second


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("length", [56, 9])
def test_of_random_inputs(kind, length):
    """Against `ttt_scan`'s own states, with a ragged end, a clamped tau and a NaN."""
    random = torch.Generator().manual_seed(0)
    B, H, F, K = 2, 3, 8, 16

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    k, v, k_unrotated = normal(3, B, H, length, F)
    lam, tau = normal(B, H, length).sigmoid() / F, normal(K).clamp_min(0)
    gamma, beta = normal(2, H, F)
    model = INNER_MODELS[kind]
    state = tuple(0.1 * normal(H, *shape) for shape in model.state_shapes(F).values())
    seen = inner_statistics(model, k, v, lam, tau, gamma, beta, state, k_unrotated)
    whole = length // K * K
    _, final = ttt_scan(model, k, k, v, lam, tau, gamma, beta, state, backend="naive")
    squares = sum(W.square().sum((-2, -1)) for W in final[::2])
    assert torch.allclose(seen.state_norm, squares.sqrt().mean())
    assert torch.allclose(seen.inner_lr, lam.mean())
    assert torch.allclose(seen.token_scale, tau.mean())
    assert seen.token_scale_clamped == (tau == 0).double().mean() and seen.finite == 1
    assert seen.loss_before.shape == (length // K,)
    if whole:
        # A token's prediction is LN's output: its query is its key, without the outer residual.
        for field, states in ((seen.loss_init, state), (seen.loss_after, final)):
            one, at = torch.zeros(1, dtype=k.dtype), slice(whole - 1, whole)
            given = (x[:, :, at] for x in (k, k, v))
            out, _ = ttt_scan(
                model, *given, lam[:, :, at], one, gamma, beta, states, backend="naive"
            )
            prediction, target = out - k[:, :, at], (v - k)[:, :, at]
            assert torch.allclose(field[-1], (prediction - target).square().mean())
        assert seen.loss_before[0] == seen.loss_init[0]
    k[0, 0, 0, 0] = torch.nan
    assert inner_statistics(model, k, v, lam, tau, gamma, beta, state, k_unrotated).finite < 1
