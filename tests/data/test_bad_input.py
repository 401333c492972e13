"""All that can be wrong with input: a clear error, or a counted skip; nothing done is lost."""

import gzip
import http.server
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sentencepiece
from data_helpers import make_texts, write_shard

from megatron_ttt.data.build_folder import Workspace
from megatron_ttt.data.indexed import check_indexed
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

GOOD = [f"document {i}" for i in range(20)]


def json_lines(*bad: bytes) -> bytes:
    """Twenty good lines with the bad ones behind the thirteenth."""
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    return b"\n".join([*lines[:13], *bad, *lines[13:]]) + b"\n"


@pytest.fixture
def run(tokenizer, tmp_path):
    """Run over `a.json`, which is good, and the shard of the test."""
    write_shard(tmp_path / "a.json", GOOD)

    def run(shard: Path | str, **options):
        inputs = [str(tmp_path / "a.json"), str(shard)]
        return preprocess(inputs, str(tmp_path / "c4"), tokenizer.model_path, **options)

    return run


def is_done(tmp_path: Path, name: str) -> bool:
    workspace = Workspace(str(tmp_path / "c4"))
    return workspace.manifest_path(Shard(str(tmp_path / name))).exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "line"),
        (b'{"text": "\xff"}', "utf-8"),
        (b'{"url": "u"}', "no string under the key 'text'"),
        (b'{"text": null}', "no string under the key 'text'"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
        (b'["text"]', "not a JSON object"),
        (b"[" * 100_000, ""),
        (b'{"text": "' + b"x" * 4000 + b'"}', "longer than 3000 bytes"),
    ],
)
def test_a_bad_line(run, tmp_path, line, reason, capsys):
    (tmp_path / "b.json").write_bytes(json_lines(line))
    # One kind is enough to see that reports cross processes.
    workers = 2 if b"cut" in line else 1
    options = {"max_document_bytes": 200_000 if line[:2] == b"[[" else 3000, "workers": workers}
    with pytest.raises(UserError, match=rf"b\.json:14: .*{reason}.*--on-error skip"):
        run(tmp_path / "b.json", **options)
    # With two workers it may have been under way.
    assert workers == 2 or is_done(tmp_path, "a.json")
    assert not is_done(tmp_path, "b.json")
    summary = run(tmp_path / "b.json", on_error="skip", **options)
    assert (summary.documents, summary.malformed_lines) == (40, 1)
    assert check_indexed(tmp_path / "c4_text_document").documents == 40
    assert f"skipped {tmp_path}/b.json:14: " in capsys.readouterr().err
    assert f"skipped {tmp_path}/b.json:14: " in (tmp_path / "c4.log").read_text()


def test_a_document_of_50_megabytes(run, tmp_path):
    huge = json.dumps({"text": "inner model " * (50_000_000 // 12)}).encode()
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json_lines(huge), 1))
    with pytest.raises(UserError, match=r"b\.json\.gz:14: .*longer than 16777216 bytes"):
        run(tmp_path / "b.json.gz")
    assert is_done(tmp_path, "a.json")
    summary = run(tmp_path / "b.json.gz", on_error="skip")
    assert (summary.documents, summary.malformed_lines) == (40, 1)


def test_a_long_document_at_the_end_of_a_shard(run, tmp_path):
    (tmp_path / "b.json").write_bytes(b'{"text": "' + b"x" * 1_000_000)
    summary = run(tmp_path / "b.json", on_error="skip", max_document_bytes=100_000)
    assert (summary.documents, summary.malformed_lines) == (20, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(json_lines(), mtime=0)[:-20], "is truncated"),
        (b"", "is truncated"),
        (json_lines(), "is corrupt"),
        (gzip.compress(b"", mtime=0), "holds no documents"),
        (gzip.compress(b"\n\n", mtime=0), "holds no documents"),
    ],
)
def test_a_bad_shard(run, tmp_path, content, reason, capsys):
    (tmp_path / "b.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"b\.json\.gz {reason}"):
        run(tmp_path / "b.json.gz")
    assert is_done(tmp_path, "a.json")
    assert not is_done(tmp_path, "b.json.gz")
    summary = run(tmp_path / "b.json.gz", on_error="skip")
    assert (summary.documents, summary.skipped_shards) == (20, 1)
    assert "1 shards skipped" in capsys.readouterr().err


def test_a_group_of_skipped_shards_is_named(run, tmp_path):
    (tmp_path / "b.json.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"c4-00001-of-00002_text_document would .*b\.json\.gz is t"
    ):
        run(tmp_path / "b.json.gz", groups=2, on_error="skip")


def test_a_mended_shard_is_read_and_nothing_else_again(run, tmp_path):
    whole = gzip.compress(json_lines())
    (tmp_path / "b.json.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="is truncated"):
        run(tmp_path / "b.json.gz")
    manifest = Workspace(str(tmp_path / "c4")).manifest_path(Shard(str(tmp_path / "a.json")))
    published = manifest.stat().st_mtime_ns
    (tmp_path / "b.json.gz").write_bytes(whole)
    assert run(tmp_path / "b.json.gz", array=(0, 1)) is None
    assert manifest.stat().st_mtime_ns == published


def test_an_empty_document_is_kept_as_megatron_keeps_it_and_counted(run, tmp_path, capsys):
    write_shard(tmp_path / "b.json", ["", "text"])
    assert run(tmp_path / "b.json", append_eod=True).documents == 22
    info = check_indexed(tmp_path / "c4_text_document")
    assert (info.documents, info.sequences) == (22, 21)
    assert "1 empty" in capsys.readouterr().err


def test_input_without_tokens_is_refused(tokenizer, tmp_path):
    shard = write_shard(tmp_path / "c4.json", ["", ""])
    with pytest.raises(UserError, match="no tokens under the key 'text'"):
        preprocess([str(shard)], str(tmp_path / "out" / "c4"), tokenizer.model_path)
    assert not list((tmp_path / "out").glob("*.bin"))


class Refuse(http.server.SimpleHTTPRequestHandler):
    """Answers with the number that the path begins with."""

    def do_GET(self):
        self.send_error(int(self.path[1:4]))

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_url_that_the_server_refuses(run, tmp_path, status):
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{status}/b.json.gz"
        with pytest.raises(
            UserError, match=rf"^cannot read {url} \(.*{status}.*check the address"
        ) as error:
            run(url)
        assert is_one_clear_line(error)
        assert is_done(tmp_path, "a.json")
        assert run(url, on_error="skip").skipped_shards == 1
        server.shutdown()


def is_one_clear_line(error) -> bool:
    return len(str(error.value).splitlines()) == 1


def test_a_url_where_nobody_answers(run, tmp_path):
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/b.json.gz"
    with pytest.raises(
        UserError, match=rf"^cannot read {url} \(.*Refused.*check the address"
    ) as error:
        run(url)
    assert is_one_clear_line(error)
    assert is_done(tmp_path, "a.json")


@pytest.mark.parametrize("flag", ["append_eod", "prepend_bos"])
def test_a_tokenizer_without_eos_or_bos(run, shards, tmp_path, flag):
    model = tmp_path / "bare.model"
    with open(model, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(shards[1]),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    name = {"append_eod": "EOS", "prepend_bos": "BOS"}[flag]
    with pytest.raises(UserError, match=f"bare.model has no {name} piece; leave --"):
        preprocess([str(tmp_path / "a.json")], str(tmp_path / "x"), model, **{flag: True})
    assert not list(tmp_path.glob("x*"))
    preprocess([str(tmp_path / "a.json")], str(tmp_path / "x"), model)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one shard."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(small_disk, tokenizer, tmp_path, workers):
    write_shard(tmp_path / "a.json", GOOD)
    write_shard(tmp_path / "b.json", make_texts(3000, seed=1))
    command = build_command(tmp_path, small_disk / "c4", tokenizer, workers)
    stopped = subprocess.run(command, capture_output=True, text=True)
    assert stopped.returncode == 2
    *_, last = stopped.stderr.splitlines()
    assert last.startswith(f"error: cannot write {small_disk}/c4: No space left on device")
    assert "what was done is kept: run the same command again" in last
    assert "Traceback" not in stopped.stderr
    first = Workspace(str(small_disk / "c4")).manifest_path(Shard(f"{tmp_path}/a.json"))
    first_is_done = first.exists()
    # With two workers it may have been under way.
    assert first_is_done or workers == 2
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert ("1 of 2 shards are done already" in again.stderr) == first_is_done
    assert check_indexed(small_disk / "c4_text_document").documents == 3020


def build_command(tmp_path, prefix, tokenizer, workers) -> list:
    tool = Path(__file__).parents[2] / "tools" / "preprocess_c4.py"
    command = [sys.executable, tool, "--input", f"{tmp_path}/?.json", "--workers", str(workers)]
    return [*command, "--output-prefix", prefix, "--tokenizer-model", tokenizer.model_path]


def test_a_file_that_may_not_grow_further(tmp_path, tokenizer):
    """The kernel refuses the write, of a quota for example: a limit on the size of a file."""
    write_shard(tmp_path / "a.json", GOOD)
    write_shard(tmp_path / "b.json", make_texts(3000, seed=1))
    command = build_command(tmp_path, tmp_path / "c4", tokenizer, workers=1)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    stopped = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert stopped.returncode == 2
    assert "error: cannot write" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert is_done(tmp_path, "a.json")
    assert not list(tmp_path.rglob("*.partial"))
    assert subprocess.run(command, capture_output=True).returncode == 0
