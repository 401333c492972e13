"""verify, stats and peek, on a build and on a build that was tampered with."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_texts, write_shard

from megatron_ttt.data.inspection import peek, stats
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.verification import verify
from megatron_ttt.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_c4.py"


@pytest.fixture
def build(shards, tokenizer, tmp_path) -> str:
    prefix = str(tmp_path / "c4")
    options = {"append_eod": True, "prepend_bos": True}
    preprocess([f"{shards[0]}/*.gz"], prefix, tokenizer.model_path, **options)
    return prefix


def tamper(prefix: str, change, suffix: str = "bin", bless: bool = True) -> None:
    """Change a file of the build; `bless` makes the manifest's checksum that of the new content,
    one for the whole file, as older manifests have it."""
    import hashlib

    path = Path(f"{prefix}_text_document.{suffix}")
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    manifest = Path(f"{prefix}.manifest.json")
    final = json.loads(manifest.read_text())
    if bless:
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        final["outputs"]["c4_text_document"][suffix] = entry
    manifest.write_text(json.dumps(final))


def test_verify_accepts_a_sound_build(build):
    lines = list(verify(build, samples=300))
    assert lines[-1].startswith("250 documents encoded anew from the source give the same ids")
    assert any("ends, and only ends, with EOS" in line for line in lines)


def test_verify_refuses_a_negative_number_of_samples(build):
    with pytest.raises(UserError, match="--samples is -1"):
        list(verify(build, samples=-1))


def test_verify_follows_splits_groups_and_skipped_lines(shards, tokenizer, tmp_path):
    write_shard(tmp_path / "c.json", make_texts(90, seed=8))
    bad = (tmp_path / "c.json").read_text().splitlines()
    bad[40] = "{"
    (tmp_path / "c.json").write_text("\n".join(bad))
    inputs = [f"{shards[0]}/*.gz", str(tmp_path / "c.json")]
    options = {"split": "hash", "validation_fraction": 0.3, "groups": 2, "on_error": "skip"}
    options |= {"json_keys": ["text", "url"]}
    preprocess(inputs, str(tmp_path / "c4"), tokenizer.model_path, **options)
    lines = list(verify(str(tmp_path / "c4"), samples=600))
    assert lines[-1].startswith("678 documents encoded anew")


def set_token(index: int, value: int):
    def change(content: bytearray) -> None:
        content[2 * index : 2 * index + 2] = np.array([value], "<u2").tobytes()

    return change


def move_into_the_second(content: bytearray) -> None:
    """The first sequence gives all its tokens to the second."""
    (sequences,) = struct.unpack_from("<Q", content, 18)
    first, second = struct.unpack_from("<ii", content, 34)
    struct.pack_into("<ii", content, 34, 0, first + second)
    struct.pack_into("<q", content, 34 + 4 * sequences + 8, 0)


@pytest.mark.parametrize(
    ("change", "suffix", "bless", "message"),
    [
        (set_token(5, 7), "bin", False, "is damaged"),
        (set_token(5, 330), "bin", True, "holds the id 330 where the vocabulary has 330"),
        (set_token(0, 7), "bin", True, "without BOS at its end|without BOS"),
        (set_token(-1, 7), "bin", True, "without EOS"),
        (set_token(5, 2), "bin", True, "EOS inside a document"),
        (set_token(5, 7), "bin", True, "ids differ"),
        (move_into_the_second, "idx", True, "without tokens"),
        (lambda c: c.__setitem__(slice(34, 38), b"\1\0\0\0"), "idx", True, "a gap"),
    ],
)
def test_verify_refuses_a_build_that_was_changed(build, change, suffix, bless, message):
    if message == "without EOS":
        size = Path(f"{build}_text_document.bin").stat().st_size // 2
        change = set_token(size - 1, 7)
    tamper(build, change, suffix, bless)
    with pytest.raises(UserError, match=message):
        list(verify(build, samples=250))


def test_verify_refuses_another_tokenizer_and_an_unfinished_build(build, tmp_path):
    other = tmp_path / "other.model"
    from megatron_ttt.data.tokenizer_training import train_tokenizer

    write_shard(tmp_path / "t.json", make_texts(80, seed=4))
    other = train_tokenizer([f"{tmp_path}/t.json"], str(tmp_path / "other"), 320)
    with pytest.raises(UserError, match="is not the tokenizer of the build"):
        list(verify(build, str(other)))
    with pytest.raises(UserError, match="run the build first"):
        list(verify(str(tmp_path / "none")))


def test_stats_are_exact(build, shards, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    lengths = [len(tokenizer.encode(text)) for text in shards[1]]
    lengths = np.array([n + 2 if n else 0 for n in lengths])
    report = json.loads(stats(build, str(tmp_path / "plot.png")))
    (dataset,) = report["datasets"].values()
    assert dataset["documents"] == len(lengths)
    assert dataset["tokens"] == lengths.sum()
    assert dataset["max"] == lengths.max()
    assert dataset["empty"] == 1
    assert dataset["median"] == np.sort(lengths)[len(lengths) // 2 - 1]
    text_bytes = sum(len(text.encode()) for text in shards[1])
    assert report["tokens_per_byte"] == pytest.approx(lengths.sum() / text_bytes)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_peek_shows_the_source(build, shards):
    lines = list(peek(build, first=4, count=2))
    assert lines[1::2] == shards[1][4:6]
    with pytest.raises(UserError, match=r"has documents 0\.\.249"):
        list(peek(build, first=250))


def test_peek_passes_over_a_dataset_that_is_shorter(shards, tokenizer, tmp_path):
    prefix = str(tmp_path / "c4")
    split = {"split": "hash", "validation_fraction": 0.2}
    preprocess([f"{shards[0]}/*.gz"], prefix, tokenizer.model_path, **split)
    lines = list(peek(prefix, first=150, count=1))
    assert lines[0].startswith("--- c4-train_text_document: document 150, ")
    assert lines[2].startswith("--- c4-validation_text_document: no document 150, it has ")
    with pytest.raises(UserError, match="c4-train_text_document has documents"):
        next(peek(prefix, first=250))


def test_a_reader_that_stops_early_is_no_error(build):
    command = (
        f"'{sys.executable}' '{TOOL}' peek --output-prefix '{build}' --documents 250 | head -1"
    )
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stdout.startswith("--- c4_text_document: document 0, ")
    assert result.stderr == ""


def test_the_verbs_of_the_tool(build):
    for verb in ("verify", "stats", "peek"):
        command = [sys.executable, TOOL, verb, "--output-prefix", build]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout
    tamper(build, set_token(5, 7), bless=False)
    result = subprocess.run(
        [sys.executable, TOOL, "verify", "--output-prefix", build], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
