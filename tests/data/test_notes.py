"""What a run is told of its data: text that repeats, a validation smaller than was asked for."""

import numpy as np
import pytest
from data_helpers import write_pair
from harness import ROOT

from megatron_ttt.config import load_config
from megatron_ttt.data.batches import open_data
from megatron_ttt.doctor.files import check_files
from megatron_ttt.planning import describe, dry_run


@pytest.fixture
def overrides(tokenizer, tmp_path) -> list[str]:
    """Of a small dataset (161 tokens: 10 sequences) and one that is eight times larger."""
    write_pair(tmp_path / "small", [np.arange(3, 164)])
    write_pair(tmp_path / "large", [np.arange(3, 164)] * 8)
    overrides = [f"data.tokenizer_model={tokenizer.model_path}", "model.vocab_size=330"]
    overrides += ["training.seq_length=16", "training.global_batch_size=4", "training.steps=5"]
    return [*overrides, f"run.dir={tmp_path}/run", f"data.validation={tmp_path}/large"]


def configuration(overrides, *more: str):
    return load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], [*overrides, *more])


def test_text_that_is_read_again_is_said(cpu_platform, overrides, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    train = f"data.train=[0.9,{small},0.1,{large}]"
    said = f"{small} 1.79 times over"
    config = configuration(overrides, train)
    assert open_data(config).notes == [f"data.train: 5 steps read {said}"]
    found = [finding.text for finding in check_files(config) if finding.level == "note"]
    assert found == [f"{small} is read 1.8 times over"]
    plan = dry_run(config, 1)
    assert plan["times_read"] == {str(small): 1.7888, str(large): 0.0248}
    assert f"Times that the data is read: {small} 1.79, {large} 0.02" in describe(config, plan)
    assert open_data(configuration(overrides, f"data.train={large}")).notes == []


def test_a_plan_without_its_data_says_so(overrides, tmp_path):
    config = configuration(overrides, f"data.train={tmp_path}/none")
    plan = dry_run(config, 1)
    assert plan["times_read"] is None
    assert "Times that the data is read: unknown, it is not here" in describe(config, plan)


@pytest.mark.parametrize(
    ("eval_batches", "micro_batch", "taken"), [(2, 1, 8), (3, 1, 10), (3, 4, 8)]
)
def test_a_small_validation_is_said(
    cpu_platform, overrides, tmp_path, eval_batches, micro_batch, taken
):
    small, large = tmp_path / "small", tmp_path / "large"
    data = open_data(
        configuration(
            overrides,
            f"data.train={large}",
            f"data.validation={small}",
            f"training.eval_batches={eval_batches}",
            f"training.micro_batch_size={micro_batch}",
        )
    )
    assert sum(len(tokens) for tokens in data.validation_batches()) == taken
    asked = 4 * eval_batches
    expected = f"takes {taken} sequences, not the {asked} of training.eval_batches={eval_batches}"
    assert [expected in note for note in data.notes] == [True] * (taken < asked)
