"""The multi-node script on two nodes of one machine: each has its own address and processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from launch_helpers import (
    STEPS,
    Node,
    kubernetes_container,
    losses,
    script_environment,
    tiny_overrides,
    two_nodes,
    wait_until,
)
from test_command_line import data, options  # noqa: F401

pytestmark = pytest.mark.nodes
CONTAINER = kubernetes_container()
COMMAND = [*CONTAINER["command"], *CONTAINER["args"]]
"""The command line that the Kubernetes manifest gives to each pod."""
# Within a node; the nodes are data or pipeline parallel.
TENSOR_PARALLEL = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as pair:
        yield pair


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    return [*tiny_overrides(folder), TENSOR_PARALLEL, "checkpoint.save_every=8"]


@pytest.fixture(scope="module")
def one_nodes(overrides, tmp_path_factory) -> list[float]:
    """The losses of two tensor-parallel processes on one node."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    command = [*COMMAND, *overrides, f"run.dir={run_dir}"]
    subprocess.run(command, env=script_environment(GPUS=2), check=True)
    return losses(run_dir)


def begin(
    node: Node, rendezvous: Node, command: list[str], log: Path, nnodes: str = "2"
) -> subprocess.Popen:
    """Start the script on a node, as a person or an orchestrator would on a real one."""
    return node.start(
        command,
        log,
        NNODES=nnodes,
        GPUS=2,
        RDZV_ENDPOINT=f"{rendezvous.address}:29500",
        # A dead node is noticed after three seconds, not fifteen, and waited for five, not thirty.
        RDZV_CONF="keep_alive_interval=1,last_call_timeout=5",
    )


def run_on_both(nodes, command, run_dir: Path, kill: int | None = None) -> list[float]:
    """The losses of a run on two nodes, of which one may be killed and replaced on the way."""
    log = run_dir.with_suffix(".log")
    command = [*command, f"run.dir={run_dir}"]
    scripts = [begin(node, nodes[0], command, log) for node in nodes]
    if kill is not None:
        wait_until(lambda: "Step 10:" in log.read_text(), 240, log.read_text)
        nodes[kill].kill()
        scripts[kill] = begin(nodes[kill], nodes[0], command, log)
    assert [script.wait() for script in scripts] == [0, 0], log.read_text()[-6000:]
    assert ("Resumed from" in log.read_text()) == (kill is not None)
    return losses(run_dir)


def test_data_parallel_across_nodes_and_one_killed(nodes, overrides, one_nodes, tmp_path):
    command = [*COMMAND, *overrides]
    whole = run_on_both(nodes, command, tmp_path / "whole")
    assert whole == pytest.approx(one_nodes, abs=1e-5)
    assert run_on_both(nodes, command, tmp_path / "killed", kill=1) == whole


def test_pipeline_across_nodes_and_the_rendezvous_killed(nodes, overrides, one_nodes, tmp_path):
    """The node that RDZV_ENDPOINT names goes, and with it every torchrun's store."""
    pipeline = "parallel.pipeline_model_parallel_size=2"
    command = [*COMMAND, *overrides, pipeline]
    killed = run_on_both(nodes, command, tmp_path / "killed", kill=0)
    assert killed == pytest.approx(one_nodes, abs=1e-5)


def test_a_refusal_ends_both_nodes(nodes, overrides, tmp_path):
    """Each by itself, soon, and with the exit code that says so."""
    log = tmp_path / "log"
    command = [*COMMAND, *overrides, f"run.dir={tmp_path}/run", "checkpoint.load=nothing"]
    scripts = [begin(node, nodes[0], command, log) for node in nodes]
    wait_until(lambda: None not in [script.poll() for script in scripts], 100, log.read_text)
    assert [script.wait() for script in scripts] == [2, 2], log.read_text()[-6000:]
    assert "error: no checkpoint at nothing" in log.read_text()


def test_cache_folders_of_their_own(nodes, data, tmp_path):  # noqa: F811
    """Each node mounts another folder under data.cache_dir, and fills it as --build-index does."""
    seen, own = tmp_path / "seen", [tmp_path / "of-node-0", tmp_path / "of-node-1"]
    for folder in (seen, *own):
        folder.mkdir()
    recipe = options(data, tmp_path / "run", TENSOR_PARALLEL, f"data.cache_dir={seen}")
    recipe = ["--config", "yaml_recipes/debug_cpu.yaml", *recipe]

    def mounting(folder: Path) -> list:
        mount = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, folder, seen]

    def entries() -> list[dict[str, int]]:
        return [{f.name: f.stat().st_mtime_ns for f in sorted(d.glob("*.npy"))} for d in own]

    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    scripts = [
        begin(node, nodes[0], [*mounting(folder), *CONTAINER["command"], *recipe], log)
        for node, folder, log in zip(nodes, own, logs)
    ]
    assert [script.wait() for script in scripts] == [0, 0], logs[1].read_text()[-6000:]
    filled = entries()
    assert filled[0] and filled[0].keys() == filled[1].keys() and not list(seen.iterdir())
    build = [sys.executable, "pretrain_ttt.py", *recipe, "--build-index"]
    built = subprocess.check_output([*mounting(own[1]), *build], cwd=ROOT, text=True)
    assert f"sequences in {seen}" in built and entries() == filled


def replicas(run_dir: Path, step: int) -> int:
    """The data-parallel size that a checkpoint was written at."""
    state = json.loads((run_dir / f"checkpoint-{step}/state.json").read_text())
    return state["layout"]["data"]


def test_a_node_that_stays_away_is_done_without(nodes, overrides, one_nodes, tmp_path):
    """NNODES=1:2: the data-parallel run ends on the node that is left."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*COMMAND, *overrides, f"run.dir={run_dir}"]
    scripts = [begin(node, nodes[0], command, log, nnodes="1:2") for node in nodes]
    wait_until(lambda: "Step 10:" in log.read_text(), 240, log.read_text)
    assert replicas(run_dir, 8) == 2
    nodes[1].kill()
    assert scripts[0].wait() == 0, log.read_text()[-6000:]
    assert "Resumed from" in log.read_text()
    assert replicas(run_dir, STEPS) == 1
    assert losses(run_dir) == pytest.approx(one_nodes, abs=1e-5)
