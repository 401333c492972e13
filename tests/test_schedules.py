"""The schedules are those of the official trainer."""

import numpy as np
import pytest
from harness import ROOT, read_golden

from megatron_ttt.config import load_config
from megatron_ttt.training.schedules import inner_lr_scale, learning_rate


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_rates_are_the_jax_trainers(kind):
    _, golden = read_golden(f"trajectory_{kind}_mamba")
    config = load_config(
        [ROOT / "yaml_recipes/debug_cpu.yaml"],
        [f"model.pattern=ttt_{kind}", "training.steps=40", "optimizer.warmup_fraction=0.2"],
    )
    steps = range(1, 41)
    config.optimizer.min_lr = 1e-5
    rates = np.array([learning_rate(config, step) for step in steps])
    assert np.abs(rates - golden["lr_applied"].numpy()).max() < 1e-9
    scales = np.array([inner_lr_scale(config, step) for step in steps])
    assert np.array_equal(scales, golden["ttt_lr_mult"].double().numpy())


def test_recipe_warms_up_and_ends():
    config = load_config([ROOT / "yaml_recipes/ttt_mlp_125m.yaml"])
    assert learning_rate(config, 1) == 0
    assert learning_rate(config, 481) == 3e-3
    assert learning_rate(config, 4801) == pytest.approx(1e-5)
    assert inner_lr_scale(config, 1) == pytest.approx(0.1, rel=4e-3)
    assert inner_lr_scale(config, 481) == 1
