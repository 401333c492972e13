"""Files of a run that somebody removes, or moves and links to, while it trains."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_ttt.checkpoint.run_folder import link_milestone, prune, publish, remove_leftovers
from megatron_ttt.training.loggers import JsonLines, TensorBoard


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("removed", ["metrics.jsonl", "."])
def test_metrics_are_made_anew(tmp_path, capsys, removed):
    path = tmp_path / "run/metrics.jsonl"
    path.parent.mkdir()
    log = JsonLines(path, 0)
    log.write({"step": 1})
    if removed == ".":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    for step in (2, 3):
        log.write({"step": step})
        assert capsys.readouterr().out.count(f"{path} was removed under the run") == (step == 2)
    log.close(failed=False)
    assert steps_in(path) == [2, 3]


def test_metrics_that_are_moved_away_are_not_written_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    log.write({"step": 1})
    path.rename(tmp_path / "old")
    log.write({"step": 2})
    log.close(failed=False)
    assert steps_in(tmp_path / "old") == [1] and steps_in(path) == [2]


def test_tensorboard_is_made_anew(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    log = TensorBoard(tmp_path / "tensorboard", 0)
    shutil.rmtree(tmp_path / "tensorboard")
    log.write({"step": 1, "loss": 2.0})
    log.close(failed=False)
    assert list((tmp_path / "tensorboard").iterdir())
    assert "tensorboard/ was removed under the run" in capsys.readouterr().out


def link(path: Path, target: Path) -> None:
    """A checkpoint's folder, elsewhere, and a link to it in its place."""
    target.mkdir(parents=True)
    (target / "state.json").write_text('{"step": 1, "config": {}, "has_optimizer": true}')
    path.symlink_to(target)


def test_a_checkpoint_that_is_a_link_is_pruned_as_one(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run_dir / "checkpoint-2").mkdir(parents=True)
    link(run_dir / "checkpoint-1", elsewhere)
    assert [path.name for path in prune(run_dir, keep=1)] == ["checkpoint-1"]
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-2"]
    assert (elsewhere / "state.json").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_a_link_gives_way_to_a_checkpoint(tmp_path, broken):
    run_dir = tmp_path / "run"
    (run_dir / ".incomplete").mkdir(parents=True)
    link(run_dir / "checkpoint-1", tmp_path / "elsewhere")
    if broken:
        shutil.rmtree(tmp_path / "elsewhere")
    publish(run_dir / ".incomplete", run_dir / "checkpoint-1", {})
    (run_dir / "milestone-1").symlink_to(tmp_path / "elsewhere")
    link_milestone(run_dir / "checkpoint-1", 1)
    assert not any(path.is_symlink() for path in run_dir.iterdir())


def test_links_that_an_earlier_version_left_are_removed(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    link(run_dir / ".removed-checkpoint-1", tmp_path / "elsewhere")
    remove_leftovers(run_dir)
    assert list(run_dir.iterdir()) == [] and (tmp_path / "elsewhere/state.json").exists()
