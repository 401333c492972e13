"""Ray without an address: a cluster of this machine alone, which nobody else can reach."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ttt.data import ray_engine
from megatron_ttt.errors import UserError

ROOT = Path(__file__).parents[2]

LISTENERS = """
import ipaddress, psutil
from megatron_ttt.data.ray_engine import _cluster
with _cluster() as ray:
    ray.get(ray.remote(lambda: None).remote())
    processes = psutil.Process().children(recursive=True)
    sockets = [c for p in processes for c in p.net_connections() if c.status == "LISTEN"]
    for socket in sockets:
        print("listens on", socket.laddr.ip.removeprefix("::ffff:"))
"""


@pytest.mark.parametrize("address", [None, "", "192.0.2.7:6379"])
def test_only_the_cluster_that_is_named_is_joined(monkeypatch, address):
    asked = []

    def init(address=None, **options):
        asked.append((address, options.get("include_dashboard")))
        raise ConnectionError("nobody there")

    ray = ModuleType("ray")
    ray.is_initialized, ray.init = lambda: False, init
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # and then as it was
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"no Ray cluster \(nobody there\); check RAY_ADDRESS"):
        ray_engine.run_on_ray(None, [], None)
    assert asked == ([(address, None)] if address else [("local", False)])


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_it_listens_on_the_loopback_interface_alone():
    pytest.importorskip("ray", reason="the optional package ray is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", LISTENERS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("listens on")]
    assert lines and set(lines) == {"listens on 127.0.0.1"}, done.stdout + done.stderr
