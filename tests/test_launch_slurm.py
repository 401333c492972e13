"""The sbatch script under a real Slurm of one node."""

import re
import subprocess
import sys

import pytest
from harness import ROOT, run
from launch_helpers import losses, script_environment, tiny_overrides, wait_until
from slurm_node import slurm_node

pytestmark = pytest.mark.slurm
SCRIPT = "examples/multi_node/slurm.sbatch"
STEPS = 5000


@pytest.fixture
def slurm():
    with slurm_node() as environment:
        yield script_environment(GPUS=1, **environment)


def ask(slurm: dict[str, str], *command: str) -> str:
    return subprocess.check_output(command, env=slurm, cwd=ROOT, text=True).strip()


def test_warned_of_its_time_limit_a_job_saves_and_queues_again(slurm, tmp_path):
    log, end = tmp_path / "log", tmp_path / "end.yaml"
    end.write_text("")
    recipe = ["--config", "yaml_recipes/ttt_linear_125m.yaml", "--config", str(end)]
    recipe += tiny_overrides(tmp_path, STEPS)
    # Slurm looks at the limits twice a minute: the warning comes 5 to 35 seconds after the start.
    warning = ["--time=2", "--signal=USR1@85"]
    options = ["--parsable", *warning, f"--output={log}"]
    job = ask(slurm, "sbatch", *options, SCRIPT, *recipe, f"run.dir={tmp_path}/run")

    def said() -> str:
        return log.read_text() if log.exists() else ask(slurm, "scontrol", "show", "job", job)

    # A job so slow to start that it has nothing to save yet just queues again.
    wait_until(lambda: "Stopped at step" in said(), 300, said)
    assert "SIGUSR1 was received. The same command goes on" in said()
    stopped_at = int(re.search(r"Stopped at step (\d+) of", said())[1])
    assert 0 < stopped_at < STEPS
    # How far it came depends on the machine: the run is to end soon after, in whatever time.
    last = stopped_at + 10
    end.write_text(f"training: {{exit_step: {last}}}")

    def state() -> dict[str, str]:
        shown = ask(slurm, "scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    wait_until(lambda: int(state()["Restarts"]) >= 1, 120, said)
    ask(slurm, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    run([sys.executable, "pretrain_ttt.py", *recipe, f"run.dir={tmp_path}/whole"])
    wait_until(lambda: state()["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT"), 300, said)
    assert state()["JobState"] == "COMPLETED", said()
    assert "queueing again" in said()
    assert f"checkpoint-{stopped_at} at step {stopped_at}" in said()
    assert len(losses(tmp_path / "run")) == last
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_container_is_a_command_before_the_script(slurm, tmp_path):
    """CONTAINER stands before the script, SRUN_OPTIONS before that; a refusal is not requeued."""
    log = tmp_path / "log"
    recipe = ["--config", "yaml_recipes/ttt_linear_125m.yaml", "model.depth=3"]
    container = tmp_path / "container"
    container.write_text('#!/bin/sh\necho "inside $1"\nshift\nexec "$@"\n')
    container.chmod(0o755)
    slurm = {**slurm, "CONTAINER": f"{container} image", "SRUN_OPTIONS": "--label"}
    options = ["--wait", "--time=5", f"--output={log}"]
    done = subprocess.run(["sbatch", *options, SCRIPT, *recipe], env=slurm, cwd=ROOT)
    assert done.returncode == 2, log.read_text()
    assert re.search(r"^0: error: .*unknown key 'model.depth'", log.read_text(), re.M)
    assert "0: inside image\n" in log.read_text()
    assert "queueing again" not in log.read_text()
