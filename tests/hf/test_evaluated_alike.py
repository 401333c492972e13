"""An export is scored on the sequences, and the targets, of the checkpoint that it was made of."""

import json

import numpy as np
import pytest
from harness import ROOT

from megatron_ttt.data.indexed import IndexedWriter
from megatron_ttt.data.tokenizer_training import train_tokenizer
from megatron_ttt.evaluation import (
    Evaluator,
    OfficialEvaluator,
    evaluation_config,
    measure,
    official_config,
)
from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.importer import import_directory

VOCABULARY = 350


@pytest.fixture(scope="module")
def trained(build_trainer, tmp_path_factory):
    """A folder with a validation set, a run of one step whose evaluation has no default, and its
    export."""
    folder = tmp_path_factory.mktemp("trained")
    lines = (ROOT / "LICENSE").read_text().split("\n\n")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    train_tokenizer([str(folder / "text.jsonl")], str(folder / "tokenizer"), VOCABULARY)
    random = np.random.default_rng(0)
    writer = IndexedWriter(folder / "data", np.dtype("<u2"))
    for _ in range(40):  # BOS, 1, stands anywhere
        ids = random.integers(1, 20, 100).astype("<u2")
        writer.append(ids.tobytes(), np.array([len(ids)], np.int32))
    writer.publish()
    build_trainer(
        *(f"model.{key}=32" for key in ("hidden_size", "ffn_hidden_size")),
        *("model.num_heads=2", f"model.vocab_size={VOCABULARY}"),
        *("run.seed=7", "data.mask_bos=false", "training.eval_batches=3", "training.steps=1"),
        *(
            "training.seq_length=24",
            "training.global_batch_size=4",
            "checkpoint.export_final=false",
        ),
        *(f"data.{key}={folder}/data" for key in ("train", "validation")),
        *(f"data.tokenizer_model={folder}/tokenizer.model", f"run.dir={folder}/run"),
    ).train()
    export_checkpoint(folder / "run/checkpoint-1", folder / "hf")
    return folder


def test_a_checkpoint_and_its_export_have_one_loss(trained, cpu_platform):
    checkpoint, folder = trained / "run/checkpoint-1", trained / "hf"
    config = evaluation_config(str(checkpoint), ["run.device=cpu"])
    ours = measure(Evaluator(config, cpu_platform, str(checkpoint), None), config)
    config = official_config(folder, [f"data.validation={trained}/data", "run.device=cpu"])
    theirs = measure(OfficialEvaluator(folder, cpu_platform, None), config)
    assert ours["sequences"] == theirs["sequences"] == 12
    assert ours["targets"] == theirs["targets"] == 12 * 24
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    assert theirs["loss_by_position"] == pytest.approx(ours["loss_by_position"], rel=1e-6)


def test_so_have_a_directory_and_the_checkpoint_imported_from_it(trained, tmp_path):
    import_directory(trained / "hf", tmp_path / "imported")
    (trained / "hf/exported_from.json").rename(tmp_path / "exported_from.json")
    theirs = official_config(trained / "hf", [])
    (tmp_path / "exported_from.json").rename(trained / "hf/exported_from.json")
    ours = evaluation_config(str(tmp_path / "imported"), [])
    assert ours.training == theirs.training and ours.training.seq_length == 24
    assert ours.run.seed == theirs.run.seed and ours.data.mask_bos == theirs.data.mask_bos
