"""A checkpoint that this megatron-core or torch cannot read is refused in one line."""

import json
import pickle
from pathlib import Path

import pytest
from small_run import STEPS, small_recipe

from megatron_ttt.checkpoint.inspection import description
from megatron_ttt.checkpoint.manifest import describe, folder_files, write_manifest
from megatron_ttt.checkpoint.run_folder import open_checkpoint
from megatron_ttt.errors import UserError
from megatron_ttt.platform import compat


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return small_recipe(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def run_dir(build_trainer, recipe, tmp_path) -> Path:
    """With a checkpoint of step 1."""
    trainer = build_trainer(*recipe, f"run.dir={tmp_path}")
    trainer.train_step(next(trainer.data.train_batches(0, STEPS)))
    trainer.save()
    return tmp_path


def doctor(checkpoint: Path, **changes) -> None:
    """Change entries of state.json (None: take out), and write a manifest of what is there."""
    state = json.loads((checkpoint / "state.json").read_text())
    state = {name: value for name, value in {**state, **changes}.items() if value is not None}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(
        checkpoint, {name: describe(checkpoint / name) for name in folder_files(checkpoint)}
    )


def refusal(build_trainer, recipe, run_dir) -> str:
    with pytest.raises(UserError) as refused:
        build_trainer(*recipe, f"run.dir={run_dir}")
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    return str(refused.value)


def test_the_versions_are_recorded(run_dir):
    state = open_checkpoint(run_dir / "checkpoint-1").state
    assert state["megatron_core"] == compat.mcore_version()
    assert f"megatron-core: {compat.mcore_version()}" in description(run_dir / "checkpoint-1")


@pytest.mark.parametrize(
    "written,here,reads",
    [
        ("0.16.1", "0.16.1", True),
        ("0.18.2", "0.16.1", True),
        ("0.19.2", "0.16.1", False),
        ("0.19.0", "0.18.2+abc", False),
        ("0.16.1", "0.19.2", True),
        ("0.19.2", "0.19.0", True),
    ],
)
def test_newer_versions_read_older_checkpoints(monkeypatch, written, here, reads):
    monkeypatch.setattr(compat, "mcore_version", lambda: here)
    assert compat.reads_checkpoints_of(written) == reads


def test_a_checkpoint_of_a_newer_version_is_refused(build_trainer, recipe, run_dir, monkeypatch):
    monkeypatch.setattr(compat, "mcore_version", lambda: "0.16.1")
    doctor(run_dir / "checkpoint-1", megatron_core="0.19.2")
    said = refusal(build_trainer, recipe, run_dir)
    assert "checkpoint-1 was written by megatron-core 0.19.2, which " in said


def test_a_checkpoint_without_a_version_is_loaded(build_trainer, recipe, run_dir):
    doctor(run_dir / "checkpoint-1", megatron_core=None, torch=None)
    assert build_trainer(*recipe, f"run.dir={run_dir}").step == 1


@pytest.mark.skipif(
    not compat.mcore_version().startswith("0.16"), reason="0.19 asks for none of it"
)
def test_one_of_a_newer_version_that_does_not_say_so(build_trainer, recipe, run_dir):
    """What is left out is what 0.19 leaves out, and what any version asks for."""
    checkpoint = run_dir / "checkpoint-1"
    (checkpoint / "common.pt").unlink(missing_ok=True)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "unknown"}')
    doctor(checkpoint, megatron_core=None)
    said = refusal(build_trainer, recipe, run_dir)
    assert "megatron-core of a version not recorded there" in said


class Newer:
    """Stands for a class that this torch does not have."""


def test_metadata_of_a_newer_torch(build_trainer, recipe, run_dir):
    metadata = pickle.dumps(Newer()).replace(b"Newer", b"Other")
    (run_dir / "checkpoint-1/.metadata").write_bytes(metadata)
    doctor(run_dir / "checkpoint-1", torch="99.0")
    said = refusal(build_trainer, recipe, run_dir)
    assert "which no checkpoint of torch" in said and "test_checkpoint_versions.Other" in said
