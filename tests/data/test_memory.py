"""Memory does not grow with the corpus."""

import subprocess
import sys

import pytest
from data_helpers import make_texts, write_shard

# The parent of a run reports its own peak and, through what it waited for, its largest worker's.
PROGRAM = """
import resource, sys
from megatron_ttt.data import indexed, source
from megatron_ttt.data.preprocess import preprocess
source.CHUNK_BYTES, indexed.CHUNK_DOCUMENTS = 1 << 16, 1 << 12
preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], append_eod=True, workers=int(sys.argv[4]))
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss)
"""


def peaks(shards: str, output: str, model, workers: int) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, shards, output, str(model), str(workers)]
    # spawn'd workers import the main module, which a program given by -c does not have to be.
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in result.stdout.split()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_peak_is_that_of_a_twentieth_of_the_input(tokenizer, tmp_path, workers):
    texts = make_texts(4000, seed=1)
    write_shard(tmp_path / "small.json", texts)
    content = (tmp_path / "small.json").read_bytes()
    (tmp_path / "large.json").write_bytes(content * 20)
    small = peaks(str(tmp_path / "small.json"), f"{tmp_path}/s", tokenizer.model_path, workers)
    large = peaks(str(tmp_path / "large.json"), f"{tmp_path}/l", tokenizer.model_path, workers)
    for one, twenty in zip(small, large):
        assert twenty <= 1.1 * one
