"""Sample indices that are kept between runs are those of the data, or are built again."""

import json

import numpy as np
import pytest
from data_helpers import numbered_documents, write_pair
from test_dataset import build_train

from megatron_ttt.data.index_cache import load_arrays
from megatron_ttt.data.indexed import IndexedWriter
from megatron_ttt.errors import UserError


def rows(dataset) -> list[list[int]]:
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_documents_in_another_order_get_other_indices(tmp_path):
    """However late in the index they stand, and whatever size the files keep."""
    for first in (0, 1):
        lengths = np.ones(300_000, np.int32)
        lengths[270_000 + first :: 2] = 3
        writer = IndexedWriter(tmp_path / "data", np.dtype("<i4"))
        writer.append(np.arange(lengths.sum(), dtype="<i4").tobytes(), lengths)
        writer.publish()
        reused = build_train(tmp_path / "cache", str(tmp_path / "data"), 20_000)
        fresh = build_train(tmp_path / f"cache{first}", str(tmp_path / "data"), 20_000)
        for sample in range(0, 20_000, 50):
            assert reused[sample].tolist() == fresh[sample].tolist()


@pytest.mark.parametrize("content", [0, 1 << 30, "other"])
def test_an_index_that_is_not_what_was_written_is_built_again(tmp_path, content):
    prefixes = [
        write_pair(tmp_path / name, numbered_documents(40, seed))
        for seed, name in enumerate(("a", "b"))
    ]
    expected = rows(build_train(tmp_path / "cache", prefixes, 50))
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == 8
    for path in files:
        array = np.load(path)
        np.save(path, array[::-1] if content == "other" else np.full_like(array, content % 2**15))
    assert rows(build_train(tmp_path / "cache", prefixes, 50)) == expected


def test_an_entry_whose_record_is_damaged_is_built_again(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(40, seed=1))
    expected = rows(build_train(tmp_path / "cache", prefix, 50))
    (record,) = (tmp_path / "cache").glob("*.json")
    whole = record.read_text()
    assert json.loads(whole)["description"]["epochs"] == 1
    for damaged in ("", "[]", '{"sha256": []}', '{"sha256": {"order": ""}}', whole[:-9]):
        record.write_text(damaged)
        assert rows(build_train(tmp_path / "cache", prefix, 50)) == expected
        assert record.read_text() == whole


def test_a_cache_that_is_emptied_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"name another folder in data\.cache_dir"):
        load_arrays(tmp_path / "entry", "order")
