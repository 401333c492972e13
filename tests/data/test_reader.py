import gzip
import os

import pytest
from data_helpers import write_shard

from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.shards import find_shards
from megatron_ttt.errors import UserError


def test_documents_come_in_the_order_of_shard_names_then_lines(shards):
    directory, texts = shards
    found = find_shards([f"{directory}/*00001*", f"{directory}/*.gz"])
    malformed = MalformedLines()
    assert list(read_documents(found, malformed)) == texts
    assert malformed.count == 0


def test_shard_names_come_before_their_directories(tmp_path):
    for name in ["b/c4.0.json", "a/c4.1.json"]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    found = find_shards([f"{tmp_path}/**/*.json"])
    assert [str(shard) for shard in found] == [f"{tmp_path}/b/c4.0.json", f"{tmp_path}/a/c4.1.json"]


def test_a_file_that_is_there_is_no_pattern(tmp_path):
    names = ["part1.jsonl", "part[1].jsonl"]
    for name in names:
        write_shard(tmp_path / name, ["text"])
    assert [s.name for s in find_shards([str(tmp_path / name) for name in names])] == names
    assert [s.name for s in find_shards([f"{tmp_path}/part[12].jsonl"])] == names[:1]


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    with pytest.raises(UserError, match=r"/caf\\udce9\.json' is no UTF-8: rename"):
        find_shards([f"{tmp_path}/*"])


def test_plain_shards_read_like_compressed_ones(tmp_path):
    texts = ["one", "zwei\nzeilen"]
    for name in ["a.json", "b.jsonl", "c.jsonl.gz"]:
        write_shard(tmp_path / name, texts)
    found = find_shards([f"{tmp_path}/*"])
    assert list(read_documents(found, MalformedLines())) == texts * 3


def test_malformed_lines_are_reported_with_file_and_line(tmp_path, capsys):
    shard = tmp_path / "c4.json"
    shard.write_bytes(
        b'{"text": "good"}\n'
        b"\n"
        b'{"text": "cut of\n'
        b'{"texts": "other key"}\n'
        b'{"text": 5}\n'
        b'["text"]\n'
        b'{"text": "\\ud800"}\n'
        b'{"text": "\xff"}\n' + b"[" * 100_000 + b"\n" + b'{"text": "last"}'
    )
    malformed = MalformedLines()
    assert list(read_documents([shard], malformed)) == ["good", "last"]
    assert malformed.count == 7
    reported = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in reported] == [
        f"skipped {shard}:{number}" for number in range(3, 10)
    ]
    assert "no string under the key 'text'" in reported[1]


def test_many_malformed_lines_are_counted_not_printed(tmp_path, capsys):
    shard = tmp_path / "c4.json"
    shard.write_bytes(b"?\n" * 1000)
    malformed = MalformedLines(shown=3)
    assert list(read_documents([shard], malformed)) == []
    assert malformed.count == 1000
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "not gzip", "directory"])
def test_an_unreadable_shard_is_a_user_error_with_its_name(shards, tmp_path, damage):
    shard = tmp_path / "c4-train.00000.json.gz"
    whole = next(shards[0].iterdir()).read_bytes()
    if damage == "truncated":
        shard.write_bytes(whole[: len(whole) // 2])
    elif damage == "corrupt":
        shard.write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    elif damage == "not gzip":
        shard.write_bytes(gzip.decompress(whole))
    else:
        shard.mkdir()
    with pytest.raises(UserError, match=str(shard)):
        list(read_documents([shard], MalformedLines()))


def test_inputs_that_match_nothing_or_no_shard_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*\*\.json"):
        find_shards([f"{tmp_path}/*.json"])
    (tmp_path / "c4.txt").touch()
    with pytest.raises(UserError, match=r"c4\.txt is no shard"):
        find_shards([f"{tmp_path}/*"])
