"""Which parameters decay."""

import numpy as np
import pytest
import torch
from harness import ROOT


@pytest.fixture(scope="module")
def after_one_step(cpu_platform, tmp_path_factory):
    """The weights after one step from the same start, under different options."""
    from megatron_ttt.config import load_config
    from megatron_ttt.model import global_parameters
    from megatron_ttt.training.optimizer import gather_parameters
    from megatron_ttt.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("decay")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(2, 96, (1, 8, 33)))

    def weights(*options: str) -> dict[str, torch.Tensor]:
        overrides = [
            f"data.fixed_batches={folder}/tokens.npy",
            "data.train=[]",
            "data.validation=[]",
            "data.tokenizer_model=null",
            f"run.dir={folder}/run",
            "training.steps=1",
            "training.seq_length=32",
            "model.vocab_size=96",
            "optimizer.warmup_fraction=0",
            *options,
        ]
        config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], overrides)
        trainer = Trainer(config, cpu_platform)
        trainer.train_step(next(trainer.data.train_batches(0, 1)))
        gather_parameters(trainer.ddp_chunks)
        return {name: p.detach().clone() for name, p in global_parameters(trainer.chunks[0])}

    return weights


def test_decay_of_all_or_of_matrices(after_one_step):
    none = after_one_step("optimizer.weight_decay=0")
    everything = after_one_step("optimizer.weight_decay=0.5")
    megatron = after_one_step("optimizer.weight_decay=0.5", "optimizer.decay_all=false")
    for name, weight in none.items():
        small = weight.ndim == 1 or name.endswith(".bias")
        expected = none if small else everything
        assert torch.equal(megatron[name], expected[name]), name
        if weight.abs().max() > 0.01:  # not zero before the step
            assert not torch.equal(everything[name], none[name]), name
