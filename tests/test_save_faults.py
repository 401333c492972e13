"""A save that fails for a reason of the machine: the rank is named, and training goes on."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from failing_saves import MOMENTS
from harness import ROOT, torchrun
from small_run import STEPS, small_recipe, steps

from megatron_ttt.checkpoint import state, writer
from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.writer import Checks
from megatron_ttt.training import saving


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return small_recipe(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(params=["asynchronous=false", "asynchronous=true"])
def trainer(request, build_trainer, recipe, tmp_path):
    """After a first save, and a step that is to be saved."""
    mode = f"checkpoint.{request.param}"
    trainer = build_trainer(*recipe, f"run.dir={tmp_path}/run", mode, "checkpoint.keep=1")
    trainer.save()
    trainer.saver.wait()
    trainer.train_step(next(trainer.data.train_batches(0, STEPS)))
    return trainer


def check_failed(trainer, capfd, why: str) -> None:
    """Saving said why it failed, on one line, and leaves what there was; the next one is good."""
    trainer.save()
    trainer.saver.wait()
    out, err = capfd.readouterr()
    assert f"checkpoint-1 was not saved (rank 0: {why}" in out and "Traceback" not in out + err
    assert steps(trainer.run_dir) == [0] and not list(trainer.run_dir.glob(".*"))


def check_next(trainer) -> None:
    trainer.save()
    trainer.saver.wait()
    assert trainer.saver.failure is None and steps(trainer.run_dir) == [1]
    assert find_damage(trainer.run_dir / "checkpoint-1") is None


def fail(error: BaseException, *arguments, **options):
    raise type(error)(*error.args)  # anew: one that was raised holds on to what it met


NO_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    "owner,name,error,why",
    [
        (os, "memfd_create", NO_FILES, "[Errno 24] Too many open files"),
        (state, "_rng_object", MemoryError(), "MemoryError"),
        (writer, "describe", MemoryError("no more"), "no more"),
        (writer, "save_config", NO_FILES, "[Errno 24] Too many open files"),
    ],
)
def test_a_machine_that_has_no_more(trainer, capfd, monkeypatch, owner, name, error, why):
    with monkeypatch.context() as failing:
        failing.setattr(owner, name, partial(fail, error))
        check_failed(trainer, capfd, why)
    check_next(trainer)


def test_no_more_processes(trainer, capfd, monkeypatch):
    if not trainer.config.checkpoint.asynchronous:
        pytest.skip("forks nothing")
    with monkeypatch.context() as failing:
        no_more = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        failing.setattr(os, "fork", partial(fail, no_more))
        check_failed(trainer, capfd, "[Errno 11] Resource temporarily unavailable")
    check_next(trainer)


@pytest.mark.parametrize("moment", ["before megatron-core looks", "before it is written to"])
def test_a_folder_that_is_removed(trainer, capfd, monkeypatch, moment):
    def remove(go_on=lambda: None, *arguments, **options):
        for folder in trainer.run_dir.glob(".incomplete-*"):
            shutil.rmtree(folder)
        return go_on(*arguments, **options)

    with monkeypatch.context() as removing:
        if moment.startswith("before megatron"):
            save = writer.dist_checkpointing.save
            removing.setattr(writer.dist_checkpointing, "save", partial(remove, save))
        else:
            checks = Checks(compute=remove, compare=lambda seen: {})
            removing.setattr(saving, "save_checks", lambda *arguments: checks)
        check_failed(trainer, capfd, "[Errno 2] No such file or directory")
    check_next(trainer)


def test_no_more_threads(trainer, monkeypatch):
    """For what is removed behind training."""
    no_more = RuntimeError("can't start new thread")
    monkeypatch.setattr(saving.threading.Thread, "start", partial(fail, no_more))
    trainer.saver._remove_behind(trainer.run_dir / "checkpoint-0")
    assert steps(trainer.run_dir) == []


@pytest.mark.disk
@pytest.mark.parametrize(
    "mode", ["true", pytest.param("false", marks=pytest.mark.matrix)], ids="asynchronous={}".format
)
def test_each_rank_hears_of_a_failure_of_another(recipe, tmp_path, mode):
    run_dir, output = tmp_path / "run", tmp_path / "said.json"
    overrides = [*recipe, f"run.dir={run_dir}", "run.device=cpu", "run.timeout_minutes=1"]
    script = Path(ROOT / "tests/failing_saves.py")
    torchrun(2, script, output, *overrides, f"checkpoint.asynchronous={mode}")
    said = json.loads(output.read_text())
    assert said.pop("at last") is None
    expected = {moment: f"rank {rank}: no more" for moment, (*_, rank) in MOMENTS.items()}
    if mode == "false":
        expected["the fork"] = None
    assert said == expected
    assert steps(run_dir) == [1, 2] and not list(run_dir.glob(".*"))
