"""Inputs and outputs with odd names, columns, servers and encodings."""

import errno
import functools
import http.server
import io
import json
import threading
from pathlib import Path

import pytest
from data_helpers import make_texts, pair, write_shard

from megatron_ttt.data import concatenation
from megatron_ttt.data.inspection import stats
from megatron_ttt.data.preprocess import merge, preprocess
from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.shards import Shard, find_shards
from megatron_ttt.data.tokenizer import load_tokenizer
from megatron_ttt.data.tokenizer_training import train_tokenizer
from megatron_ttt.errors import UserError

TEXTS = make_texts(60, seed=3)


def packed(columns: dict | list, names=None, **options) -> bytes:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, names), file, **options)
    return file.getvalue()


def test_two_columns_of_one_name_are_a_bad_shard(tokenizer, tmp_path):
    write_shard(tmp_path / "a.json", TEXTS)
    (tmp_path / "b.parquet").write_bytes(packed([["a"], ["b"], ["c"]], ["text", "text", "url"]))
    run = ([str(tmp_path / "?.*")], str(tmp_path / "c4"), tokenizer.model_path)
    with pytest.raises(UserError, match=r"b\.parquet has two columns 'text'; rename one"):
        preprocess(*run)
    assert preprocess(*run, on_error="skip").skipped_shards == 1
    (tmp_path / "b.parquet").write_bytes(packed([["u"], ["v"], ["c"]], ["url", "url", "text"]))
    assert list(read_documents(find_shards([f"{tmp_path}/b.*"]), MalformedLines())) == ["c"]


def test_a_column_of_lists_is_a_bad_shard(tmp_path):
    (tmp_path / "b.parquet").write_bytes(packed({"text": [["a", "b"]]}))
    with pytest.raises(UserError, match=r"b\.parquet has no column 'text' of plain values"):
        list(read_documents(find_shards([f"{tmp_path}/b.*"]), MalformedLines()))


def test_a_question_mark_in_a_local_name_is_a_character(tokenizer, tmp_path):
    folder = tmp_path / "what?"
    folder.mkdir()
    for name in ("really?.json", "plain.json"):
        write_shard(folder / name, TEXTS)
    found = find_shards([str(folder / "really?.json"), f"{folder}/plain.json"])
    assert [shard.name for shard in found] == ["plain.json", "really?.json"]
    assert preprocess([str(folder / "*.json")], str(folder / "c4"), tokenizer.model_path)
    assert Shard("https://host/a.json.gz?token=b/c").name == "a.json.gz"
    assert Shard("s3://bucket/a?.json.gz").name == "a?.json.gz"


@pytest.mark.parametrize("character", ["x", "é"])
def test_a_shard_s_name_may_be_as_long_as_the_file_system_allows(tokenizer, tmp_path, character):
    stems = [character * ((249 - 1) // len(character.encode())) + end for end in "ab"]
    for stem in stems:
        write_shard(tmp_path / f"{stem}.json", TEXTS)
    done = preprocess([f"{tmp_path}/*.json"], str(tmp_path / "c4"), tokenizer.model_path)
    assert done.documents == 2 * len(TEXTS)


def test_a_finished_run_is_finished_where_nothing_can_be_written(
    tokenizer, tmp_path, monkeypatch, capsys
):
    run = ([str(write_shard(tmp_path / "a.json", TEXTS))], str(tmp_path / "c4"))
    done = preprocess(*run, tokenizer.model_path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert preprocess(*run, tokenizer.model_path) == done
    assert merge(run[1]) == done
    assert capsys.readouterr().err.count("c4 is complete: nothing to do") == 2
    with pytest.raises(UserError, match="append_eod was False and is True"):
        preprocess(*run, tokenizer.model_path, append_eod=True)


@pytest.mark.parametrize("name", ["out/", "out/.", "", "."])
def test_a_prefix_without_a_name_is_refused(tokenizer, tmp_path, monkeypatch, name):
    shard = str(write_shard(tmp_path / "a.json", TEXTS))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    prefix = f"{tmp_path}/{name}" if name.startswith("out") else name
    for command in (
        lambda: preprocess([shard], prefix, tokenizer.model_path),
        lambda: merge(prefix),
        lambda: stats(prefix),
        lambda: train_tokenizer([shard], prefix, 330),
    ):
        with pytest.raises(UserError, match=r"^--output-prefix '.*' names a folder; add the name"):
            command()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "out"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_no_line_of_a_file_that_is_no_utf_8_is_taken(tmp_path, encoding):
    content = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three"))
    (tmp_path / "a.json").write_bytes(content.encode(encoding))
    malformed = MalformedLines()
    assert list(read_documents([tmp_path / "a.json"], malformed)) == []
    assert malformed.count >= 3


def test_a_byte_order_mark_of_utf_8_is_passed_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\n')
    assert list(read_documents([tmp_path / "a.json"], MalformedLines())) == ["one"]


class WithoutLength(http.server.BaseHTTPRequestHandler):
    """Serves one file without saying how long it is, and from its beginning alone."""

    content = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_parquet_from_a_server_that_tells_no_length(tokenizer, tmp_path):
    pytest.importorskip("aiohttp")
    content = packed({"text": TEXTS})
    (tmp_path / "a.parquet").write_bytes(content)
    preprocess([str(tmp_path / "a.parquet")], str(tmp_path / "a"), tokenizer.model_path)
    handler = type("Handler", (WithoutLength,), {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.parquet"
        preprocess([url], str(tmp_path / "b"), tokenizer.model_path)
        server.shutdown()
    assert pair(tmp_path / "a_text_document") == pair(tmp_path / "b_text_document")


def test_the_disk_holds_the_tokens_once_and_what_is_under_way(tokenizer, tmp_path, monkeypatch):
    """The page says so; with --overwrite the old output too, until the new one is there."""
    for number in range(4):
        write_shard(tmp_path / f"{number}.json", 40 * TEXTS)
    run = ([str(tmp_path / "?.json")], str(tmp_path / "c4"), tokenizer.model_path)
    put, seen = concatenation.publish_json, []

    def allocated() -> int:
        files = [path for path in tmp_path.rglob("*") if ".bin" in path.name]
        return sum(512 * path.stat().st_blocks for path in files)

    def record(path, content):
        seen.append(allocated())
        put(path, content)

    monkeypatch.setattr(concatenation, "publish_json", record)
    preprocess(*run)
    output, part = allocated(), allocated() / 4
    assert output > 1e6 and len(seen) == 4
    assert max(seen) < output + 1.05 * part
    preprocess(*run, overwrite=True)
    assert len(seen) == 8 and max(seen) < 2 * output + 1.05 * part


def test_a_unigram_model_with_its_control_tokens_as_pieces_says_what_to_use(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(UserError, match=r"made from, where there is one, else a BPE tokenizer$"):
        load_tokenizer(tmp_path / "tokenizer.json")
