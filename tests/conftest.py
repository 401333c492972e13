"""Fixtures: the CPU platform in this process, and quiet subprocesses."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
    """A trainer of the CPU's debug recipe in this process, from overrides."""
    from harness import ROOT

    from megatron_ttt.config import load_config
    from megatron_ttt.training.trainer import Trainer

    def build(*overrides: str) -> Trainer:
        config = load_config([ROOT / "yaml_recipes/debug_cpu.yaml"], [*overrides, "run.device=cpu"])
        return Trainer(config, cpu_platform)

    return build
