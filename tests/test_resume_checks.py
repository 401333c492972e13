"""What a run is told when it goes on from a checkpoint with another configuration."""

import copy
from pathlib import Path

import pytest
from harness import ROOT

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.config import load_config, to_dict
from megatron_ttt.errors import UserError
from megatron_ttt.training.resume_checks import check_resume

TRAINED = ["run.dir=run", "training.steps=100", "optimizer.lr=3e-3", "optimizer.min_lr=1e-5"]
TRAINED += ["data.train=[a]", "data.tokenizer_model=t.model", "data.fixed_batches=null"]


def warnings(*overrides: str, step: int = 90, has_optimizer: bool = True) -> list[str]:
    recipe = [ROOT / "yaml_recipes/debug_cpu.yaml"]
    tree = to_dict(load_config(recipe, TRAINED))
    state = {"step": step, "config": copy.deepcopy(tree), "has_optimizer": has_optimizer}
    said = []
    config = load_config(recipe, [*TRAINED, *overrides])
    check_resume(Checkpoint(Path("run/checkpoint-90"), state), config, said.append)
    assert all(line.startswith("Warning: run/checkpoint-90 was trained with ") for line in said)
    return [line.removeprefix("Warning: run/checkpoint-90 was trained with ") for line in said]


@pytest.mark.parametrize(
    ("override", "both"),
    [
        ("run.seed=7", "run.seed=42, not 7"),
        ("training.seq_length=8", "training.seq_length=128, not 8"),
        ("training.precision=bf16", "training.precision=fp32, not bf16"),
        ("data.train=[b]", "data.train=['a'], not ['b']"),
        ("data.fixed_batches=moved.npy", "data.fixed_batches=None, not moved.npy"),
        ("data.tokenizer_model=u.model", "data.tokenizer_model=t.model, not u.model: unless"),
        ("data.mask_bos=false", "data.mask_bos=True, not False"),
        ("optimizer.weight_decay=0", "optimizer.weight_decay=0.1, not 0.0"),
        ("optimizer.beta1=0.8", "optimizer.beta1=0.9, not 0.8"),
        ("optimizer.beta2=0.9", "optimizer.beta2=0.95, not 0.9"),
        ("optimizer.eps=1e-6", "optimizer.eps=1e-08, not 1e-06"),
        ("optimizer.clip_grad=2", "optimizer.clip_grad=1.0, not 2.0"),
    ],
)
def test_every_key_that_changes_training_is_named_with_both_values(override, both):
    (said,) = warnings(override)
    assert said.startswith(both)


@pytest.mark.parametrize(
    ("override", "both", "rates"),
    [
        ("optimizer.lr=6e-5", "optimizer.lr=0.003, not 6e-05", ("0.0001002", "1.151e-05")),
        ("optimizer.min_lr=0", "optimizer.min_lr=1e-05, not 0.0", ("0.0001002", "9.046e-05")),
        ("training.steps=200", "training.steps=100, not 200", ("0.0001002", "0.002016")),
        (
            "optimizer.warmup_fraction=0.5",
            "optimizer.warmup_fraction=0.1, not 0.5",
            ("0.0001002", "0.0002955"),
        ),
    ],
)
def test_another_schedule_is_said_with_the_rate_before_and_after(override, both, rates):
    key, rate = warnings(override)
    assert key.startswith(f"{both}: the schedules go on as if")
    before, now = rates
    expected = f"the learning rate of step 91 would be {before}, now it is {now}"
    assert rate == f"another schedule: by it {expected}"


def test_another_inner_schedule_is_said():
    said = warnings("training.steps=1000", "optimizer.inner_lr_warmup=true", step=20)
    assert "optimizer.inner_lr_warmup=None, not True" in " ".join(said)
    expected = "the factor of the inner learning rate of step 21 would be 1, now it is 0.2"
    assert expected in said[-1]


def test_what_changes_nothing_is_not_warned_of():
    assert warnings() == []
    rest = ["data.bos_id=5", "training.log_every=3", "checkpoint.keep=1", "training.exit_step=95"]
    assert warnings(*rest, "training.recompute=true", "data.validation=[v]") == []
    # A checkpoint of step 0 is imported weights: a new run.
    assert warnings("run.seed=7", "training.global_batch_size=16", step=0) == []


def test_what_would_repeat_or_skip_data_is_refused():
    with pytest.raises(UserError, match=r"training\.global_batch_size=8; going on with 16 would"):
        warnings("training.global_batch_size=16")
    with pytest.raises(UserError, match=r"is past training\.steps=80: raise it"):
        warnings("training.steps=80")
    with pytest.raises(UserError, match=r"optimizer\.decay_all=true: set that"):
        warnings("optimizer.decay_all=false")
    assert warnings("optimizer.decay_all=false", has_optimizer=False) == []
