import struct

import numpy as np
import pytest
from data_helpers import numbered_documents, write_pair
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_ttt.data.indexed import check_indexed, token_dtype
from megatron_ttt.errors import UserError


def test_token_dtype_follows_megatron():
    for vocab_size in [256, 32_000, 65_499, 65_500, 65_536, 128_256]:
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_megatron_core_reads_the_documents_back(tmp_path, dtype):
    documents = numbered_documents(40, seed=0)
    prefix = write_pair(tmp_path / "data", documents, dtype)
    dataset = IndexedDataset(prefix)
    assert dataset.index.dtype == np.dtype(dtype)
    for read, written in zip(dataset[:], documents, strict=True):
        np.testing.assert_array_equal(read, written)
    info = check_indexed(prefix)
    assert (info.dtype, info.sequences, info.documents) == (np.dtype(dtype), 40, 40)
    assert info.tokens == sum(map(len, documents))


def damage(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def put(content, kind, place, value):
    struct.pack_into(kind, content, place, value)
    return content


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", None, "data.idx not found"),
        (".bin", None, "data.bin not found"),
        (".idx", lambda c: b"PK" + c[2:], "not a Megatron index"),
        (".idx", lambda c: b"", "not a Megatron index"),
        (".idx", lambda c: c[:20], "truncated inside its header"),
        (".idx", lambda c: c[:-1], "bytes where its header says"),
        (".idx", lambda c: c + b"\0", "bytes where its header says"),
        (".idx", lambda c: c[:9] + struct.pack("<Q", 2) + c[17:], "version 2"),
        (".idx", lambda c: c[:17] + b"\x06" + c[18:], "dtype code 6"),
        (".idx", lambda c: c[:-8] + struct.pack("<q", 3), "do not end with its sequences"),
        (".idx", lambda c: c[:18] + struct.pack("<QQ", 0, 1) + bytes(8), "holds no tokens"),
        (".idx", lambda c: put(c, "<i", 34 + 4, -5), "corrupt .sequence 1 has -5 tokens"),
        (".idx", lambda c: put(c, "<i", 34 + 4, 1 << 30), "corrupt .a gap before sequence 2"),
        (".idx", lambda c: put(c, "<q", 34 + 20 + 16, 1 << 50), "corrupt .a gap before sequence 2"),
        (".idx", lambda c: put(c, "<q", 34 + 20, 4), "corrupt .a gap before sequence 0"),
        (".idx", lambda c: put(c, "<q", 34 + 60, 1), "do not begin with its sequences"),
        (".idx", lambda c: put(c, "<q", 34 + 60 + 16, 4), "document 2 ends before it begins"),
        (".bin", lambda c: c[:-1], "data.bin has .* bytes where its .idx says"),
        (".bin", lambda c: c + c, "data.bin has .* bytes where its .idx says"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path, suffix, change, message):
    prefix = write_pair(tmp_path / "data", numbered_documents(5, seed=0))
    path = tmp_path / f"data{suffix}"
    if change is None:
        path.unlink()
    else:
        damage(path, change)
    with pytest.raises(UserError, match=message):
        check_indexed(prefix)
