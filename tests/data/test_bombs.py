"""A few bytes that stand for gigabytes: memory stays within bounds."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ttt.data.parquet_shard import MAX_PAGE_BYTES
from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.errors import UserError

# The peak of this process alone: what it was forked from may have had more.
PROGRAM = """
import re, sys
from megatron_ttt.data.reader import Block, parse_block, read_blocks
from megatron_ttt.data.shards import local_shard
try:
    import pyarrow.compute, pyarrow.parquet
except ImportError:
    pass
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
before, documents = peak(), 0
for block in read_blocks(local_shard(sys.argv[1])):
    if isinstance(block, Block):
        documents += len(list(parse_block(block, ("text",), lambda *_: None)))
print(documents, peak() - before)
"""


def read(path: Path) -> tuple[int, int]:
    """Documents in a shard, and the MiB that reading it takes."""
    command = [sys.executable, "-c", PROGRAM, str(path)]
    documents, mebibytes = subprocess.run(command, capture_output=True, check=True).stdout.split()
    return int(documents), int(mebibytes)


def test_zstd_of_half_a_gigabyte(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(1 << 20)
    content = b"".join(packer.compress(zeros) for _ in range(512)) + packer.flush()
    tail = zstandard.ZstdCompressor().compress(b'\n{"text": "last"}\n')
    (tmp_path / "a.json.zst").write_bytes(content + tail)
    documents, mebibytes = read(tmp_path / "a.json.zst")
    assert documents == 1
    assert mebibytes < 64


def write_parquet(path: Path, values: list, **options) -> Path:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(
        pyarrow.table({"text": values}), path, compression="zstd", write_statistics=False, **options
    )
    return path


def test_a_dictionary_of_one_long_value(tmp_path):
    values = ["x" * (8 << 20)] * 64
    path = write_parquet(tmp_path / "a.parquet", values, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 4096
    documents, mebibytes = read(path)
    assert documents == 64
    assert mebibytes < 200


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_that_is_too_large_is_refused_before_it_is_decompressed(
    tmp_path, dictionary, monkeypatch
):
    monkeypatch.setattr("megatron_ttt.data.parquet_shard.MAX_PAGE_BYTES", 1 << 20)
    assert MAX_PAGE_BYTES == 128 << 20
    path = tmp_path / "a.parquet"
    write_parquet(path, ["short", "x" * (2 << 20)], use_dictionary=dictionary)
    with pytest.raises(UserError, match=r"a\.parquet has a page of 20\d{5} bytes, decompressed"):
        list(read_documents([path], MalformedLines()))


def test_rows_are_numbered_across_row_groups_and_long_ones_left_out(tmp_path, capsys):
    values = [f"document {number}" for number in range(500)]
    values[130], values[400] = "x" * (17 << 20), None
    path = write_parquet(tmp_path / "a.parquet", values, row_group_size=100, data_page_size=200)
    kept = [value for value in values if value and len(value) < 100]
    assert list(read_documents([path], MalformedLines())) == kept
    errors = capsys.readouterr().err
    assert "a.parquet:131: the row is longer than 16777216 bytes" in errors
    assert "a.parquet:401: no string under the key 'text'" in errors
