"""Memory does not grow with the corpus: the same mix of shards once, and twenty times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import make_texts, write_shard

# The parent of a run reports its own peak and, through what it waited for, its largest worker's.
PROGRAM = """
import json, resource, sys
from megatron_ttt.data import gigatoken_backend, indexed, shards
from megatron_ttt.data.preprocess import preprocess
shards.CHUNK_BYTES, indexed.CHUNK_DOCUMENTS = 1 << 16, 1 << 12
gigatoken_backend._CACHE_TEXT = 1 << 20
preprocess(sys.argv[1:2], *sys.argv[2:4], append_eod=True, **json.loads(sys.argv[4]))
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss)
"""


def peaks(shards: Path, output: Path, model: Path, **options) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, f"{shards}/*", output, model, json.dumps(options)]
    # spawn'd workers import the main module, which a program given by -c does not have to be.
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in result.stdout.split()]


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of three shards, of short, of long and of very long documents, and a folder with
    each of them twenty times."""
    once, often = tmp_path_factory.mktemp("once"), tmp_path_factory.mktemp("often")
    texts = make_texts(1500, seed=1)
    for shard, length in enumerate((1, 100, 1500)):
        joined = ["\n".join(texts[i : i + length]) for i in range(0, len(texts), length)]
        path = write_shard(once / f"c4-train.{shard:05d}.json", joined)
        for copy in range(20):
            (often / f"c4-train.{3 * copy + shard:05d}.json").symlink_to(path)
    return once, often


@pytest.mark.memory
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("backend", "workers"), [("sentencepiece", 1), ("sentencepiece", 2), ("gigatoken", 1)]
)
def test_the_peak_is_that_of_a_twentieth_of_the_input(tokenizer, tmp_path, mix, backend, workers):
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    run = {"model": tokenizer.model_path, "backend": backend, "workers": workers}
    once = peaks(mix[0], tmp_path / "once", **run)
    often = peaks(mix[1], tmp_path / "often", **run)
    for one, twenty in zip(once, often):
        assert twenty <= 1.1 * one
