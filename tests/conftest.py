"""Tiers of tests; fixtures: the CPU platform in this process, and quiet subprocesses."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKERS = {
    "matrix": "further layouts, models and sizes of what an unmarked case stands for",
    "kills": "processes that are killed or interrupted at many random moments",
    "disk": "disks that fill up, are slow or read-only",
    "memory": "measured peaks of memory against what is estimated",
    "speed": "measured times against each other",
    "nodes": "two nodes in network namespaces; needs root and iproute2",
    "slurm": "a real Slurm controller on this machine",
    "versions": "other versions of what the project builds on",
    "ray": "real Ray clusters",
    "docs": "every command of every page, and the site they make",
    "compile": "kernels compiled ahead of time",
}
"""What the second tier is made of. A test with none of these markers is of the first."""


def pytest_addoption(parser):
    parser.addoption(
        "--tier",
        choices=["first", "second"],
        help="first: what `make test` runs; second: what `make test-all` adds to it",
    )


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("numprocesses", None):
        # One server for all workers.
        from prefork import ensure_server

        ensure_server()


def pytest_collection_modifyitems(config, items):
    tier = config.getoption("tier")
    if tier:
        chosen, others = [], []
        for item in items:
            second = any(item.get_closest_marker(name) for name in MARKERS)
            (chosen if second == (tier == "second") else others).append(item)
        items[:] = chosen
        config.hook.pytest_deselected(items=others)
    # The longest case: begun late, it runs while the other worker has nothing left to do.
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(scope="session")
def cpu_platform():
    """megatron-core in this process: CPU, one rank, no parallelism."""
    from megatron_ttt import platform as platforms

    platform = platforms.start("cpu")
    platforms.start_process_group(platform)
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        platforms.seed_everything(0)
    return platform


@pytest.fixture(scope="session")
def build_trainer(cpu_platform):
    """A trainer of the CPU's debug recipe in this process, from overrides and hooks."""
    from harness import ROOT

    from megatron_ttt.config import load_config
    from megatron_ttt.training.hooks import Hook
    from megatron_ttt.training.trainer import Trainer

    def build(*overrides: str, hooks: Sequence[Hook] = ()) -> Trainer:
        config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], [*overrides, "run.device=cpu"])
        return Trainer(config, cpu_platform, hooks=hooks)

    return build
