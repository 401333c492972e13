"""What is looked at before a run, or an evaluation, takes its data."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import make_texts, write_pair, write_shard
from harness import ROOT

from megatron_ttt.config import load_config
from megatron_ttt.data import dataset_check
from megatron_ttt.data.batches import _ignored_target_id, open_data
from megatron_ttt.data.dataset_check import check_made_with
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.tokenizer import SentencePieceTokenizer
from megatron_ttt.data.tokenizer_training import train_tokenizer
from megatron_ttt.errors import UserError


@pytest.fixture
def build(shards, tokenizer, tmp_path) -> str:
    """The prefix of a dataset, beside that of a build whose name begins as its own does."""
    model = tmp_path / "tokenizer.model"
    shutil.copy(tokenizer.model_path, model)
    preprocess([f"{shards[0]}/*.gz"], str(tmp_path / "c4-train"), model)
    write_shard(tmp_path / "c.json", make_texts(5, seed=1))
    preprocess([str(tmp_path / "c.json")], str(tmp_path / "c4"), model)
    return str(tmp_path / "c4-train_text_document")


def test_data_of_another_tokenizer_is_refused(build, shards, tokenizer, tmp_path):
    (tmp_path / ".manifest.json").write_text("{}")  # another program's
    check_made_with(build, tokenizer, 330)
    options = {"bos_id": 1, "eos_id": 0, "sha256": tokenizer.sha256, "model_path": "t.json"}
    with pytest.raises(UserError, match=r"t\.json has the eos_id 0, in the build it was 2"):
        check_made_with(build, SimpleNamespace(**options), 330)
    # Of the same size, under the same path.
    write_shard(tmp_path / "other.json", make_texts(200, seed=7))
    path = tmp_path / "tokenizer.model"
    train_tokenizer([f"{tmp_path}/other.json"], str(path.with_suffix("")), 330, overwrite=True)
    with pytest.raises(UserError, match=rf"c4-train_text_document was not made with data.*{path}"):
        check_made_with(build, SentencePieceTokenizer(path), 330)


@pytest.mark.parametrize("place", [0, -1])
def test_ids_outside_the_vocabulary_are_refused_without_a_manifest(
    tokenizer, tmp_path, monkeypatch, place
):
    monkeypatch.setattr(dataset_check, "_LOOKED_AT", 10)
    ids = np.arange(3, 63)
    check_made_with(write_pair(tmp_path / "good", [ids]), tokenizer, 330)
    ids[place] = 330
    with pytest.raises(UserError, match=r"bad\.bin holds token ids outside 0\.\.329"):
        check_made_with(write_pair(tmp_path / "bad", [ids]), tokenizer, 330)


@pytest.mark.parametrize("wrong", ["train", "validation"])
def test_training_and_validation_data_are_looked_at(cpu_platform, tokenizer, tmp_path, wrong):
    write_pair(tmp_path / "good", [np.arange(3, 303)])
    write_pair(tmp_path / "wrong", [np.arange(3, 403)])
    overrides = [f"data.{split}={tmp_path}/good" for split in ("train", "validation")]
    overrides += [f"data.tokenizer_model={tokenizer.model_path}", "model.vocab_size=330"]
    overrides += [f"run.dir={tmp_path}", "training.seq_length=16"]
    recipe = [ROOT / "yaml_recipes/debug_cpu.yaml"]
    open_data(load_config(recipe, overrides))
    config = load_config(recipe, [*overrides, f"data.{wrong}={tmp_path}/wrong"])
    with pytest.raises(UserError, match=r"wrong\.bin holds token ids outside"):
        open_data(config)
    if wrong == "train":
        open_data(config, train=False)


@pytest.mark.parametrize(
    ("bos_id", "eos_id", "masked"), [(1, 2, 1), (-1, 2, None), (0, 0, None), (-1, -1, None)]
)
def test_bos_is_masked_unless_it_ends_documents_too(bos_id, eos_id, masked):
    config = SimpleNamespace(data=SimpleNamespace(mask_bos=True, bos_id=5))
    tokenizer = SimpleNamespace(bos_id=bos_id, eos_id=eos_id)
    assert _ignored_target_id(config, tokenizer) == masked
    assert _ignored_target_id(config, None) == 5
    config.data.mask_bos = False
    assert _ignored_target_id(config, tokenizer) is None
