"""What AdamW does with which parameters, and with options that change."""

import numpy as np
import pytest
import torch

from megatron_ttt.errors import UserError


def one_step(folder) -> list[str]:
    """Overrides of a run of one step."""
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(2, 96, (1, 8, 33)))
    return [
        f"data.fixed_batches={folder}/tokens.npy",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        f"run.dir={folder}/run",
        "training.steps=1",
        "training.seq_length=32",
        "model.vocab_size=96",
        "optimizer.warmup_fraction=0",
    ]


@pytest.fixture(scope="module")
def after_one_step(build_trainer, tmp_path_factory):
    """The weights after one step from the same start, under different options."""
    from megatron_ttt.model import global_parameters
    from megatron_ttt.training.optimizer import gather_parameters

    recipe = one_step(tmp_path_factory.mktemp("decay"))

    def weights(*options: str) -> dict[str, torch.Tensor]:
        trainer = build_trainer(*recipe, *options)
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


def test_a_resumed_run_takes_its_options_from_the_command(build_trainer, tmp_path):
    recipe = one_step(tmp_path)
    first = build_trainer(*recipe)
    first.train_step(next(first.data.train_batches(0, 1)))
    first.save()
    options = "weight_decay=0.25", "beta1=0.8", "beta2=0.99", "eps=1e-3"
    resumed = build_trainer(*recipe, *(f"optimizer.{option}" for option in options))
    assert resumed.step == 1
    for group in resumed.optimizer.param_groups:
        assert group["weight_decay"] == 0.25 and group["eps"] == 1e-3
        assert tuple(group["betas"]) == (0.8, 0.99)
    with pytest.raises(UserError, match="decay_all=true: set that"):
        build_trainer(*recipe, "optimizer.decay_all=false")


def test_a_checkpoint_of_another_kind_of_device_goes_on(build_trainer, tmp_path, monkeypatch):
    recipe = one_step(tmp_path)
    with monkeypatch.context() as patch:  # a GPU's random state has 16 bytes
        state = torch.zeros(16, dtype=torch.uint8)
        patch.setattr(torch.cuda, "get_rng_state", lambda: state)
        first = build_trainer(*recipe)
        first.train_step(next(first.data.train_batches(0, 1)))
        first.save()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert build_trainer(*recipe).step == 1
    assert not torch.equal(torch.get_rng_state(), before)  # the host's has come back
