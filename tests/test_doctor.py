"""The doctor: what it finds on a machine, between nodes, in a recipe's files, and in a trial."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import yaml
from data.data_helpers import write_pair
from harness import ROOT, finish
from launch_helpers import Node, script_environment, tiny_overrides, two_nodes

from megatron_ttt.config import load_config
from megatron_ttt.doctor.files import check_files
from megatron_ttt.doctor.machine import check_machine
from megatron_ttt.doctor.network import NodeCheck, check_nodes, own_index, ports_to_try
from megatron_ttt.doctor.trial import trial_config
from megatron_ttt.errors import UserError

DOCTOR = [sys.executable, "-m", "megatron_ttt.doctor"]
PORT = 29500


def problems(findings) -> list[str]:
    return [str(finding) for finding in findings if finding.level == "problem"]


def test_a_machine_that_is_good(tmp_path):
    findings = list(check_machine(tmp_path / "run"))
    assert problems(findings) == []
    said = "\n".join(map(str, findings))
    assert "megatron-core" in said and f"{tmp_path} takes" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written():
    assert any("/proc" in problem for problem in problems(check_machine(Path("/proc/run"))))


def test_files_of_a_recipe(tmp_path):
    recipe = ROOT / "yaml_recipes/ttt_linear_125m.yaml"
    missing = f"data.train=[{tmp_path}/gone]"
    found = problems(check_files(load_config([recipe], [missing])))
    assert any(f"{tmp_path}/gone" in problem for problem in found)
    assert any("tokenizer" in problem for problem in found)
    good = load_config([recipe], tiny_overrides(tmp_path))
    assert problems(check_files(good)) == []
    (tmp_path / "tokens.npy").write_text("no array")
    assert "tokens.npy cannot be read" in problems(check_files(good))[0]


def test_data_and_a_tokenizer_that_do_not_belong_together(tmp_path):
    write_pair(tmp_path / "pair", [np.arange(3, 350)])
    letters = {chr(ord("a") + i): i for i in range(26)}
    tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])).save(f"{tmp_path}/tokenizer.json")
    overrides = [f"data.{key}=[{tmp_path}/pair]" for key in ("train", "validation")]
    overrides += [f"data.tokenizer_model={tmp_path}/tokenizer.json", "model.vocab_size=300"]
    recipe = ROOT / "yaml_recipes/ttt_linear_125m.yaml"
    found = problems(check_files(load_config([recipe], overrides)))
    assert len(found) == 2 and all("holds token ids outside 0..299" in each for each in found)


def two_local_checks(clock=time.time):
    """Two checks on loopback addresses at once; the findings of the first, and both verdicts."""

    async def both():
        pair = [NodeCheck(["127.0.0.1", "127.0.0.2"], free_port(), 20) for _ in range(2)]
        pair[1].index, pair[1].port, pair[1].ports = 1, pair[0].port, pair[0].ports
        pair[1].clock = clock
        verdicts = await asyncio.gather(*(check.run() for check in pair))
        return pair[0].findings, verdicts

    return asyncio.run(both())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_clocks_that_disagree():
    findings, verdicts = two_local_checks()
    assert problems(findings) == [] and verdicts == [True, True]
    findings, verdicts = two_local_checks(clock=lambda: time.time() - 30)
    (problem,) = problems(findings)
    # By what the answer takes, the measure is off.
    behind = float(re.search(r"its clock is ([\d.]+) s behind this node's", problem)[1])
    assert 25 < behind < 35 and verdicts == [False, False]


def test_other_versions(monkeypatch):
    from megatron_ttt.doctor import network

    # The first call answers the first node's caller, and so on: every answer differs.
    count = iter(range(100_000))
    monkeypatch.setattr(network, "versions", lambda: {"torch": f"2.{next(count)}"})
    findings, _ = two_local_checks()
    assert any("has torch 2." in problem for problem in problems(findings))


def test_nodes_that_make_no_sense():
    with pytest.raises(UserError, match="is no host name"):
        own_index(["no.such.host.invalid"])
    with pytest.raises(UserError, match=r"none of 192\.0\.2\.1"):
        own_index(["192.0.2.1"])


def test_a_name_that_other_nodes_cannot_reach():
    """Debian's /etc/hosts gives a machine's own name as 127.0.1.1."""
    found = problems(check_nodes(["localhost", "127.0.0.2"], free_port(), 1))
    assert len(found) == 1 and "localhost is a loopback address here" in found[0]


def test_a_port_that_is_taken_here():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        found = problems(check_nodes(["127.0.0.1"], port, 1))
    assert any(f"port {port} cannot be listened on here" in problem for problem in found)


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as pair:
        yield pair


def examine(nodes: list[Node], folder: Path, wait: int = 60) -> list[tuple[int, str]]:
    """The exit code and the report of the doctor on each node, run at once."""
    logs = [folder / f"{node.name}.log" for node in nodes]
    addresses = [node.address for node in nodes]
    command = [*DOCTOR, "--wait", wait, "--port", PORT, "--nodes", *addresses]
    running = [node.start(command, log) for node, log in zip(nodes, logs)]
    return [(process.wait(), log.read_text()) for process, log in zip(running, logs)]


@pytest.mark.nodes
def test_two_good_nodes(nodes, tmp_path):
    for code, report in examine(nodes, tmp_path):
        assert code == 0, report
        assert "answers on ports 29500, " in report
        assert "gloo over 2 nodes: 64 MiB all-reduced at" in report


@contextlib.contextmanager
def blocked(node: Node, port: int, how: str):
    if not shutil.which("iptables"):
        pytest.skip("needs iptables")
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", how]
    node.run("iptables", "-A", *rule)
    try:
        yield
    finally:
        node.run("iptables", "-D", *rule)


@pytest.mark.nodes
def test_a_blocked_port_is_found_and_named(nodes, tmp_path):
    """The first node drops calls of the rendezvous port and rejects those of a handed-out one."""
    handed_out = ports_to_try(PORT)[2]
    with blocked(nodes[0], PORT, "DROP"), blocked(nodes[0], handed_out, "REJECT"):
        (here, report_here), (there, report_there) = examine(nodes, tmp_path)
    assert (here, there) == (1, 1)
    address = nodes[0].address
    dropped = f"problem  node {address}: port {PORT} (the rendezvous): no answer in 3 s"
    rejected = f"problem  node {address}: port {handed_out} (gloo and NCCL use such ports): refused"
    assert dropped in report_there and rejected in report_there
    # The other way all is well, and both know that the whole is not.
    assert f"node {nodes[1].address}: answers on ports" in report_here
    assert report_here.count("problem  ") == 1 and report_there.count("problem  ") == 3
    assert "collective: not tried" in report_here and "collective: not tried" in report_there


@pytest.mark.nodes
def test_a_port_that_another_program_holds(nodes, tmp_path):
    """A listener that takes calls and says nothing."""
    silent = "import socket, time; s = socket.create_server(('', 29500)); print(1); time.sleep(600)"
    log = tmp_path / "silent"
    process = nodes[0].start([sys.executable, "-uc", silent], log)
    while "1" not in log.read_text():
        time.sleep(0.1)
    (_, report_here), (_, report_there) = examine(nodes, tmp_path)
    process.kill()
    assert f"port {PORT} cannot be listened on here" in report_here
    assert f"port {PORT} (the rendezvous): takes the call but says nothing" in report_there


def test_a_trial_is_as_much_of_the_recipe_as_the_cpu_takes():
    config = load_config([ROOT / "yaml_recipes/ttt_mlp_1b.yaml"])
    trial, less = trial_config(config, 2, on_gpu=False)
    assert less == [
        "2 of 24 layers",
        "256 of 2,048 tokens (on the CPU)",
        "2 of 256 sequences a step",
    ]
    kept = "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size", "pattern"
    for name in kept:
        assert getattr(trial.model, name) == getattr(config.model, name)
    assert trial.training.precision == "bf16" and trial.parallel == config.parallel


def test_the_trial_and_its_resume(tmp_path):
    """The whole command on a model of seconds; the four sizes differ in the recipe alone."""
    recipe = tmp_path / "recipe.yaml"
    parent = ROOT / "yaml_recipes/debug_cpu.yaml"
    recipe.write_text(yaml.safe_dump({"extends": str(parent), "run": {"dir": f"{tmp_path}/run"}}))
    command = [*DOCTOR, "--trial", "--config", str(recipe), "data.train=[nowhere]"]
    command += ["checkpoint.keep=1", "training.steps=3"]  # which the trial needs more of
    done = finish(command, env=script_environment())
    lines = done.stdout.splitlines()
    assert any(line.startswith("problem  data.train: nowhere") for line in lines)
    assert "random tokens, as the recipe's are not there" in done.stdout
    assert any(line.startswith("good     trial: 10 steps on 1 process") for line in lines), lines
    assert "good     resume: from step 5 on, the same losses to the last bit" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_trial_that_fails_says_why(tmp_path):
    recipe = ROOT / "yaml_recipes/debug_cpu.yaml"
    overrides = [f"run.dir={tmp_path}/run", "run.device=cuda"]
    command = [*DOCTOR, "--trial", "--config", recipe, *overrides]
    done = finish(command, env=script_environment())
    assert done.returncode == 1
    assert "problem  trial: ended with exit code" in done.stdout
    assert "run.device=cuda, but torch sees no GPU" in done.stdout
    assert not (tmp_path / "doctor-trial-run").exists()


def test_a_resume_from_elsewhere_is_a_problem(monkeypatch, tmp_path):
    from megatron_ttt.doctor import trial

    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    record = {"loss": 1.0, "seconds": 1.0, "memory_gib": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "log").write_text("Nothing to go on from\n")
    monkeypatch.setattr(trial, "_train", lambda *_: None)
    found = list(trial._train_and_resume(tmp_path / "recipe.yaml", tmp_path, 1, False))
    assert [finding.level for finding in found] == ["good", "problem"]
    assert found[1].text == "it did not go on from checkpoint-5"


def test_what_needs_a_recipe():
    done = finish([*DOCTOR, "--trial"], env=script_environment())
    assert done.returncode == 2 and "error: --config is not given" in done.stderr
