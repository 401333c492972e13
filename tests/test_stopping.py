"""What counts as a stop, and what a stop, a kill or a failure does to the export at a run's end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from harness import ROOT, finish
from small_run import begin, begin_torchrun, losses, small_recipe, steps, wait_for

from megatron_ttt.config import load_config
from megatron_ttt.errors import TrainingError
from megatron_ttt.hf import background
from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.saving import Saver
from megatron_ttt.training.stopping import LAUNCHER, SIGNALS, StopRequests


@pytest.fixture
def handlers(monkeypatch):
    """Signal handlers are put back, and no launcher is known."""
    monkeypatch.delenv(LAUNCHER, raising=False)
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_is_a_stop(handlers):
    stop = StopRequests()
    assert signal.getsignal(signal.SIGHUP) == stop._note
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.heard_here() == signal.SIGHUP


def test_under_nohup_a_closed_terminal_is_none(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequests()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_launch_script_ends_its_processes_by_sighup(handlers, monkeypatch):
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    StopRequests()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


class SignalInSave(Hook):
    """Sends this process SIGTERM while it saves."""

    def on_save_start(self, trainer):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_a_save_is_not_followed_by_a_step(handlers, build_trainer, tmp_path):
    overrides = [*small_recipe(tmp_path), f"run.dir={tmp_path}/run"]
    trainer = build_trainer(*overrides, hooks=[SignalInSave()])
    trainer.stop = StopRequests()
    assert trainer.train() == "SIGTERM was received"
    assert steps(tmp_path / "run") == [trainer.step] == [3]


@pytest.fixture
def saver(cpu_platform, tmp_path, monkeypatch) -> Saver:
    """With an export that takes for ever, begun."""
    monkeypatch.setattr(
        background, "_command", lambda *paths: [sys.executable, "-c", "import time; time.sleep(99)"]
    )
    config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], [f"run.dir={tmp_path}"])
    saver = Saver(config, torch.device("cpu"))
    saver.exports.add(tmp_path / "checkpoint-8", tmp_path / "final_model")
    saver.exports.advance()
    (tmp_path / ".unverified-.exported-final_model.0123").mkdir()
    return saver


def test_a_stop_ends_the_last_export(saver, tmp_path, capsys):
    process = saver.exports._running.process
    assert saver.wait_for_exports(lambda: "SIGTERM was received") == "SIGTERM was received"
    assert process.poll() is not None and not saver.exports.busy
    assert f"NOT exported: {tmp_path}/final_model: the next run does it" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_is_killed_is_no_success(saver, tmp_path, capsys):
    saver.exports._running.process.kill()
    with pytest.raises(TrainingError, match=r"final_model was not exported: .* by SIGKILL"):
        saver.wait_for_exports(lambda: None)
    assert f"NOT exported: {tmp_path}/final_model: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [".export-final_model.log"]


def test_an_export_that_cannot_begin_is_no_success(saver, tmp_path, monkeypatch):
    def no_process(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    saver.exports.abandon()
    saver.exports.advance()
    monkeypatch.setattr(background.subprocess, "Popen", no_process)
    saver.exports.add(tmp_path / "checkpoint-8", tmp_path / "final_model")
    with pytest.raises(TrainingError, match=r"final_model was not exported: .*unavailable"):
        saver.wait_for_exports(lambda: None)


def test_an_exporter_ends_with_its_parent(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    module = "megatron_ttt.hf.background"
    done = finish([sys.executable, "-m", module, "checkpoint", "out", ended.pid])
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "the run that asked for this export has ended",
    )


@pytest.mark.kills
def test_a_closed_terminal_under_torchrun_leaves_a_checkpoint(tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher, _ = begin_torchrun(small_recipe(tmp_path), run_dir, log)
    wait_for(log, "Step 2:", launcher)
    launcher.send_signal(signal.SIGHUP)
    launcher.wait(timeout=90)
    assert "SIGHUP was received. The same command goes on" in log.read_text()
    assert steps(run_dir)[-1] == losses(run_dir)[-1][0]


@pytest.mark.kills
def test_sigterm_in_the_last_export_ends_it_at_once(tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    recipe = [*small_recipe(tmp_path), "checkpoint.export_final=true", "training.steps=2"]
    launcher = begin(recipe, run_dir, log)
    wait_for(log, "Step 2:", launcher)
    while not list(run_dir.glob(".export-*.log")):
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.terminate()
    launcher.wait(timeout=90)
    output = log.read_text()
    assert "NOT exported" in output and "Stopped at step 2 of 2: SIGTERM was received" in output
    assert not list(run_dir.glob(".*"))
