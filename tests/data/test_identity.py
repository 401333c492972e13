"""Data that changed under a run, and index caches of another configuration."""

import numpy as np
import pytest
from data_helpers import numbered_documents, write_pair

from megatron_ttt.data import fingerprint
from megatron_ttt.data.batches import data_files
from megatron_ttt.data.dataset import build_datasets
from megatron_ttt.data.fingerprint import check_unchanged, fingerprints
from megatron_ttt.errors import UserError


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("position", [0, -1, 300])
def test_any_changed_byte_is_refused(tmp_path, ending, position):
    write_pair(tmp_path / "a", numbered_documents(40, 0))
    paths = [tmp_path / "a.bin", tmp_path / "a.idx", tmp_path / "not there"]
    begun = fingerprints(paths)
    check_unchanged(begun, fingerprints(paths))
    flip(tmp_path / f"a.{ending}", position)
    with pytest.raises(UserError, match=rf"a\.{ending} has changed since this run began, in its c"):
        check_unchanged(begun, fingerprints(paths))


def test_a_big_file_is_looked_at_in_places(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_BLOCK", 16)
    path = tmp_path / "big"
    path.write_bytes(bytes(64 * 16 * 10))
    begun = fingerprints([path])
    for position in (0, -1):
        flip(path, position)
        with pytest.raises(UserError, match="in its content"):
            check_unchanged(begun, fingerprints([path]))
        flip(path, position)
    check_unchanged(begun, fingerprints([path]))
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(UserError, match="10241 bytes, not 10240"):
        check_unchanged(begun, fingerprints([path]))


@pytest.mark.parametrize(
    "tokenizer", [["t.model"], ["folder/tokenizer.json", "folder/tokenizer_config.json"]]
)
def test_the_files_of_a_run(tokenizer):
    from megatron_ttt.config import load_config

    overrides = ["data.train=[0.3,a,0.7,b]", "data.validation=[c]"]
    overrides.append(f"data.tokenizer_model={tokenizer[0]}")
    config = load_config(["yaml_recipes/debug_cpu.yaml"], overrides)
    names = [*tokenizer, "a.bin", "a.idx", "b.bin", "b.idx", "c.bin", "c.idx"]
    assert [str(path) for path in data_files(config)] == names


def test_a_cache_of_another_configuration_is_not_reused(tmp_path):
    prefix = write_pair(tmp_path / "a", numbered_documents(60, 0))
    other = write_pair(tmp_path / "b", numbered_documents(50, 1))
    configurations = [
        {"blend": prefix, "samples": 50, "length": 16, "seed": 1},
        {"blend": prefix, "samples": 50, "length": 24, "seed": 1},
        {"blend": prefix, "samples": 50, "length": 16, "seed": 2},
        {"blend": prefix, "samples": 400, "length": 16, "seed": 1},
        {"blend": [0.3, prefix, 0.7, other], "samples": 50, "length": 16, "seed": 1},
        {"blend": [0.5, prefix, 0.5, other], "samples": 50, "length": 16, "seed": 1},
    ]

    def rows(cache, blend, samples, length, seed) -> np.ndarray:
        train, _ = build_datasets(
            blend,
            None,
            train_samples=samples,
            validation_samples=0,
            seq_length=length,
            seed=seed,
            cache_dir=cache,
        )
        return np.stack([train[i] for i in range(samples)])

    for number, configuration in enumerate(configurations):
        fresh = rows(tmp_path / f"cache{number}", **configuration)
        for _ in range(2):  # the second time from what all have left there
            assert np.array_equal(rows(tmp_path / "shared", **configuration), fresh), configuration
    assert len({rows(tmp_path / "shared", **c).tobytes() for c in configurations}) == 6
