"""Token ids outside the vocabulary end a run before they are trained on, at every layout."""

import numpy as np
import pytest
from data_helpers import write_pair
from harness import ROOT
from test_dataset import build_train

from megatron_ttt.config import load_config
from megatron_ttt.data.batches import open_data
from megatron_ttt.data.dataset import FixedBatches
from megatron_ttt.data.sampling import TokenLoader
from megatron_ttt.errors import UserError


@pytest.mark.parametrize("wrong", [-100, -1, 97, 500])
def test_fixed_batches_are_looked_at_step_by_step(cpu_platform, tmp_path, wrong):
    ids = np.random.default_rng(0).integers(0, 97, (3, 8, 17))
    ids[1, 6, 16] = wrong
    np.save(tmp_path / "ids.npy", ids)
    overrides = [f"data.fixed_batches={tmp_path}/ids.npy", "model.vocab_size=97", "data.train=[]"]
    overrides += ["data.validation=[]", "data.tokenizer_model=null"]
    overrides += ["training.steps=3", "training.global_batch_size=8", "training.seq_length=16"]
    overrides += ["training.micro_batch_size=2", f"run.dir={tmp_path}/run"]
    config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], overrides)
    batches = open_data(config).train_batches(0, 3)
    assert len(next(batches)) == 4
    place = rf"ids\.npy, batch 1, row 6, column 16: the id {wrong} is outside 0\.\.96"
    with pytest.raises(UserError, match=place):
        next(batches)


def test_the_place_of_a_wrong_id_in_a_dataset_is_named(tmp_path):
    """One id of a document in the middle, in whatever window it comes."""
    documents = np.split(np.arange(600) % 50, range(37, 600, 37))
    tokens = np.concatenate(documents)
    for place in (0, 250, 588):
        wrong = tokens.copy()
        wrong[place] = 50
        prefix = write_pair(tmp_path / f"{place}", np.split(wrong, range(37, 600, 37)))
        dataset = build_train(tmp_path / "cache", prefix, 80)
        loader = TokenLoader(dataset, 0, 10, 8, 4, vocab_size=50)
        with pytest.raises(UserError, match=rf"/{place}\.bin, token {place}: the id 50 is outside"):
            list(loader)
    assert len(list(TokenLoader(dataset, 0, 10, 8, 4, vocab_size=51))) == 10


def test_rows_of_a_data_parallel_rank_are_named_as_the_file_has_them(tmp_path):
    ids = np.zeros((2, 6, 5), np.int32)
    ids[1, 3, 2] = 9
    np.save(tmp_path / "ids.npy", ids)
    loader = TokenLoader(
        FixedBatches(tmp_path / "ids.npy"), 0, 2, 6, 1, dp_rank=1, dp_size=2, vocab_size=9
    )
    with pytest.raises(UserError, match=r"batch 1, row 3, column 2: the id 9 is outside 0\.\.8"):
        list(loader)
