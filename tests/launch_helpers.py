"""What the tests of the launch scripts share: a tiny run, its figures, and nodes to run it on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import ROOT, environment

STEPS = 24


def tiny_overrides(folder: Path, steps: int = STEPS, seq_length: int = 32) -> list[str]:
    """Overrides of any recipe that make it a run of seconds on the CPU."""
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(2, 96, (steps, 4, seq_length + 1)))
    return [
        f"data.fixed_batches={tokens}",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        f"training.steps={steps}",
        f"training.seq_length={seq_length}",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        "training.precision=fp32",
        "training.log_every=1",
        "model.vocab_size=96",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.ffn_hidden_size=64",
        "run.device=cpu",
    ]


def script_environment(**settings: str | int) -> dict[str, str]:
    """The environment of a launch script: this Python, no GPU."""
    tests_own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {**environment(), **tests_own, **{key: str(value) for key, value in settings.items()}}


def kubernetes_manifest() -> dict:
    """The shipped PyTorchJob."""
    return yaml.safe_load((ROOT / "examples/multi_node/pytorchjob.yaml").read_text())


def kubernetes_container() -> dict:
    """The container of each of its pods."""
    replica = kubernetes_manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]
    return replica["template"]["spec"]["containers"][0]


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, from the first; each step stands there once."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def wait_until(what: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Return when `what()` is true; fail with `why()` after so many seconds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why()
        time.sleep(0.1)


class Node:
    """A node of its own address: a network namespace."""

    def __init__(self, name: str, address: str, interface: str):
        self.name, self.address, self.interface = name, address, interface

    def start(self, command: list, log: Path, **settings: str | int) -> subprocess.Popen:
        """Begin a command on this node; what it prints is added to `log`."""
        settings = {"GLOO_SOCKET_IFNAME": self.interface, "NODE_ADDR": self.address, **settings}
        with open(log, "a") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                cwd=ROOT,
                env=script_environment(**settings),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def run(self, *command: str) -> None:
        """Run a command on this node that must succeed."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)

    def kill(self) -> None:
        """SIGKILL every process of this node, until there is none."""
        while pids := subprocess.check_output(["ip", "netns", "pids", self.name], text=True):
            for pid in map(int, pids.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes joined by a virtual link; they and what runs on them are gone afterwards."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ttt{os.getpid()}{side}" for side in "ab"]
    nodes = [Node(name, f"10.77.0.{i}", name) for i, name in enumerate(names, start=1)]
    try:
        for node in nodes:
            made = subprocess.run(["ip", "netns", "add", node.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        link = ["ip", "-n", names[0], "link", "add", names[0], "type", "veth"]
        subprocess.run([*link, "peer", "name", names[1], "netns", names[1]], check=True)
        for node in nodes:
            ip = ["ip", "-n", node.name]
            address = [*ip, "addr", "add", f"{node.address}/24", "dev", node.interface]
            subprocess.run(address, check=True)
            for interface in ("lo", node.interface):
                subprocess.run([*ip, "link", "set", interface, "up"], check=True)
        yield nodes
    finally:
        for node in nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.kill()
            subprocess.run(["ip", "netns", "del", node.name], stderr=subprocess.DEVNULL)
