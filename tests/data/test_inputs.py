"""Every kind of input gives the same bytes: JSON lines packed any way, Parquet, URLs."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import threading
from pathlib import Path

import pytest
from data_helpers import make_texts, pair, write_shard

from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.shards import find_shards
from megatron_ttt.errors import UserError

TEXTS = make_texts(300, seed=3)


def write_table(columns: dict, file) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file)


def packed(kind: str) -> bytes:
    content = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    if kind.endswith(".gz"):
        return gzip.compress(content)
    if kind.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, one after the other
        packer = zstandard.ZstdCompressor()
        return packer.compress(content[:half]) + packer.compress(content[half:])
    if kind == ".parquet":
        file = io.BytesIO()
        write_table({"text": TEXTS, "n": [1] * 300}, file)
        return file.getvalue()
    return content


KINDS = [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet"]


# Lines are lines, however they were packed: one kind of them is enough to cross processes.
@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 1) for kind in KINDS), (".json.zst", 2), (".parquet", 2)]
)
def test_all_kinds_give_the_same_bytes(tokenizer, tmp_path, kind, workers, monkeypatch):
    write_shard(tmp_path / "plain.json", TEXTS)
    preprocess([str(tmp_path / "plain.json")], str(tmp_path / "a"), tokenizer.model_path)
    monkeypatch.setattr("megatron_ttt.data.shards.CHUNK_BYTES", 1000)
    (tmp_path / f"c4{kind}").write_bytes(packed(kind))
    run = (str(tmp_path / "b"), tokenizer.model_path)
    preprocess([f"{tmp_path}/c4{kind}"], *run, workers=workers)
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "b_text_document")
    (shard,) = json.loads((tmp_path / "b.manifest.json").read_text())["shards"]
    assert shard["size"] == len(packed(kind))
    assert shard["sha256"] == hashlib.sha256((tmp_path / f"c4{kind}").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [".json.gz", ".json.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "no bytes"])
def test_damaged_files_are_named(tmp_path, kind, damage):
    content = packed(kind)
    content = {"truncated": content[:-30], "foreign": b"plain text " * 9, "no bytes": b""}[damage]
    (tmp_path / f"c4{kind}").write_bytes(content)
    with pytest.raises(UserError, match=rf"c4{kind} is (truncated|corrupt)"):
        list(read_documents(find_shards([f"{tmp_path}/c4*"]), MalformedLines()))


def test_python_s_gzip_reads_what_isal_reads(tmp_path, monkeypatch):
    (tmp_path / "c4.json.gz").write_bytes(packed(".gz"))
    shards = find_shards([f"{tmp_path}/c4*"])
    assert list(read_documents(shards, MalformedLines())) == TEXTS
    monkeypatch.setattr("megatron_ttt.data.shards.fast_gzip", gzip)
    assert list(read_documents(shards, MalformedLines())) == TEXTS


def test_rows_of_a_table_without_text_are_malformed_and_numbered(tmp_path, capsys):
    write_table({"text": [*TEXTS[:200], None, "last"]}, tmp_path / "c4.parquet")
    malformed = MalformedLines()
    shards = find_shards([f"{tmp_path}/c4.parquet"])
    assert list(read_documents(shards, malformed)) == [*TEXTS[:200], "last"]
    assert "c4.parquet:201: no string under the key 'text'" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no column 'content'"):
        list(read_documents(shards, malformed, "content"))


def test_urls_of_fsspec_are_read_and_globbed(tokenizer, tmp_path):
    pytest.importorskip("fsspec")
    write_shard(tmp_path / "c4.00000.json", TEXTS[:100])
    write_shard(tmp_path / "c4.00001.json", TEXTS[100:])
    preprocess([f"{tmp_path}/c4.0*.json"], str(tmp_path / "a"), tokenizer.model_path)
    import fsspec

    for path in tmp_path.glob("c4.*.json"):
        with fsspec.open(f"memory://c4/{path.name}.gz", "wb") as file:
            file.write(gzip.compress(path.read_bytes()))
    found = find_shards(["memory://c4/*.json.gz"])
    assert [shard.name for shard in found] == ["c4.00000.json.gz", "c4.00001.json.gz"]
    assert all(shard.size for shard in found)
    preprocess(["memory://c4/*.json.gz"], str(tmp_path / "b"), tokenizer.model_path)
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "b_text_document")
    assert len(find_shards([f"file://{tmp_path}/c4.0000?.json"])) == 2
    write_shard(tmp_path / "c4.0000[1].json", TEXTS)
    (named,) = find_shards([f"file://{tmp_path}/c4.0000[1].json"])
    assert named.size == (tmp_path / "c4.0000[1].json").stat().st_size
    (tmp_path / "c4.0000[1].json").unlink()
    preprocess([f"file://{tmp_path}/c4.0*.json"], str(tmp_path / "c"), tokenizer.model_path)
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "c_text_document")


def test_urls_that_cannot_be_read_are_named(tokenizer, tmp_path):
    pytest.importorskip("fsspec")
    run = (str(tmp_path / "b"), tokenizer.model_path)
    with pytest.raises(UserError, match=r"cannot read memory://c4/none\.json"):
        preprocess(["memory://c4/none.json"], *run)
    with pytest.raises(UserError, match=r"no file matches 'memory://c4/none\*"):
        preprocess(["memory://c4/none*.json"], *run)
    with pytest.raises(UserError, match=r"nowhere://x\.json"):
        preprocess(["nowhere://x.json"], *run)
    assert not Path(f"{tmp_path}/b_text_document.bin").exists()


def test_a_web_server_serves_shards(tokenizer, tmp_path):
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    (tmp_path / "c4.json.gz").write_bytes(packed(".gz"))
    preprocess([str(tmp_path / "c4.json.gz")], str(tmp_path / "a"), tokenizer.model_path)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/c4.json.gz"
        preprocess([url], str(tmp_path / "b"), tokenizer.model_path, workers=2)
        server.shutdown()
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "b_text_document")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
