"""A real local Ray cluster of two nodes, one of which dies in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import make_texts, pair, write_shard

from megatron_ttt.data.preprocess import preprocess

pytest.importorskip("ray", reason="the optional package ray is not installed")

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SHARDS = 12


def command_of(inputs, prefix, tokenizer) -> list[str]:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_c4.py"), "--input", *inputs]
    command += ["--output-prefix", str(prefix), "--tokenizer-model", str(tokenizer.model_path)]
    return [*command, "--engine", "ray"]


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
    )
    yield cluster
    cluster.shutdown()


@pytest.mark.timeout(300)
def test_signals_leave_a_state_to_go_on_from(cluster, tokenizer, tmp_path):
    write_shard(tmp_path / "slow.00000.json", make_texts(60, seed=0))
    os.mkfifo(tmp_path / "slow.00001.json")  # a shard that nobody writes yet
    command = command_of([f"{tmp_path}/slow.0*.json"], tmp_path / "ray", tokenizer)
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    for number in (signal.SIGINT, signal.SIGTERM):
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        tasks = tmp_path / "ray.tasks"
        while driver.poll() is None and not list(tasks.glob("slow.00001*.partial")):
            time.sleep(0.02)
        driver.send_signal(number)
        _, errors = driver.communicate(timeout=60)
        assert driver.returncode == 128 + number, errors
        assert f"stopped by {number.name}; the same command goes on from here" in errors
        assert "Traceback" not in errors
        for partial in tasks.glob("*.partial"):
            partial.unlink()  # a killed worker's: as the next run does
    (tmp_path / "slow.00001.json").unlink()
    write_shard(tmp_path / "slow.00001.json", make_texts(60, seed=1))
    subprocess.run(command, env=environment, check=True)
    preprocess([f"{tmp_path}/slow.0*.json"], str(tmp_path / "local"), tokenizer.model_path)
    assert pair(tmp_path / "ray_text_document") == pair(tmp_path / "local_text_document")


@pytest.mark.timeout(300)
def test_a_node_that_dies_changes_nothing(cluster, tokenizer, tmp_path):
    victim = cluster.add_node(num_cpus=1)
    for i in range(SHARDS):
        name = f"c4-train.{i:05d}-of-{SHARDS:05d}.json.gz"
        write_shard(tmp_path / name, make_texts(2000, seed=i))
    inputs = [f"{tmp_path}/*.gz"]
    preprocess(inputs, str(tmp_path / "local"), tokenizer.model_path, append_eod=True)

    command = [*command_of(inputs, tmp_path / "ray", tokenizer), "--append-eod"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    tasks = tmp_path / "ray.tasks"
    while driver.poll() is None and not list(tasks.glob("*.manifest.json")):
        time.sleep(0.02)
    done = len(list(tasks.glob("*.manifest.json")))
    cluster.remove_node(victim, allow_graceful=False)
    _, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert 0 < done < SHARDS, "the node must die in the middle"
    assert pair(tmp_path / "ray_text_document") == pair(tmp_path / "local_text_document")
