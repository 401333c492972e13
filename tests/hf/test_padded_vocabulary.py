"""A vocabulary that the tensor-parallel size does not divide leaves the trainer, and comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import worker
from harness import Job, model_sections, random_official, relative, section
from safetensors.torch import load_file

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_manifest
from megatron_ttt.checkpoint.reader import read_metadata
from megatron_ttt.config import load_config
from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.loading import load_directory
from megatron_ttt.stack import EMBEDDING
from megatron_ttt.training.trainer import Trainer

VOCABULARY = 97


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Three steps of two tensor-parallel ranks, and what they make of some ids then."""
    job = Job(tmp_path_factory.mktemp("padded"))
    tokens = job.folder / "tokens.npy"
    random = np.random.default_rng(0)
    np.save(tokens, random.integers(0, VOCABULARY, (3, 4, 33)))
    config, _ = random_official("linear", "mamba", layers=2, width=32, ffn=48, vocab=VOCABULARY)
    recipe = {
        **model_sections(config),
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": 3,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32",
        },
        "data": {"fixed_batches": str(tokens)},
        "checkpoint": {"milestone_every": 0},
    }
    job.train("run", "tp2", recipe, moments=True)
    ids = torch.from_numpy(random.integers(0, VOCABULARY, (2, 32)))
    job.evaluate("logits", "tp2", job.run("run") / "checkpoint-3", ids, "float32")
    return job


def trainer(job: Job, platform, run_dir: Path, *overrides: str) -> Trainer:
    """The run's trainer, on one process."""
    config = load_config(
        [job.folder / "run.yaml"], ["run.device=cpu", f"run.dir={run_dir}", *overrides]
    )
    return Trainer(config, platform)


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    worker.collect_moments(trainer, "m", tensors, [])
    return section(tensors, "m")


def embeddings(checkpoint: Path) -> dict[str, int]:
    """Rows of the stored embedding, and of its optimizer state."""
    stored = read_metadata(checkpoint).state_dict_metadata
    return {key: entry.size[0] for key, entry in stored.items() if key.endswith(EMBEDDING)}


def test_the_vocabulary_s_rows_alone_are_stored_and_go_on(job, cpu_platform, tmp_path):
    rows = embeddings(job.folder / "run/checkpoint-3")
    assert len(rows) == 4 and set(rows.values()) == {VOCABULARY}
    load = f"checkpoint.load={job.folder}/run/checkpoint-3"
    ours, theirs = moments(trainer(job, cpu_platform, tmp_path, load)), job.tensors("run")
    for moment, value in section(theirs, "last").items():
        assert torch.equal(ours[moment], value), moment


def test_the_export_is_the_model_that_was_trained(job, tmp_path):
    checkpoint = job.folder / "run/checkpoint-3"
    export_checkpoint(checkpoint, tmp_path / "hf")
    ids = torch.from_numpy(np.load(job.folder / "logits.npy"))
    with torch.no_grad():
        logits = load_directory(tmp_path / "hf")(ids).logits
    assert logits.shape[-1] == VOCABULARY
    assert relative(logits, job.tensors("logits")["logits"]) < 1e-5


def test_a_checkpoint_that_holds_padding_is_read_without_it(job, cpu_platform, tmp_path):
    """Of before: two ranks' checkpoint had 98 rows."""
    padded = trainer(job, cpu_platform, tmp_path / "padded", f"model.vocab_size={VOCABULARY + 1}")
    padded.train()
    checkpoint = tmp_path / "padded/checkpoint-3"
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["vocab_size"] = VOCABULARY
    state["layout"]["tensor"] = 2
    del state["optimizer_checksums"]  # which padding of zeros leaves as they are
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = {name: describe(checkpoint / name) for name in folder_files(checkpoint)}
    write_manifest(checkpoint, files)
    assert set(embeddings(checkpoint).values()) == {VOCABULARY + 1}

    whole = padded.chunks[0].state_dict()[EMBEDDING]
    export_checkpoint(checkpoint, tmp_path / "hf")
    exported = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(exported, whole[:VOCABULARY])
    load = f"checkpoint.load={checkpoint}"
    loaded = trainer(job, cpu_platform, tmp_path / "loaded", load)
    assert torch.equal(loaded.chunks[0].state_dict()[EMBEDDING], whole[:VOCABULARY])
    padded_moments = moments(padded)
    for moment, value in moments(loaded).items():
        assert torch.equal(value, padded_moments[moment][: len(value)]), moment
