"""Two small shards and a tokenizer trained on them."""

from pathlib import Path

import pytest
from data_helpers import make_texts, write_shard

from megatron_ttt.data.tokenizer import SentencePieceTokenizer
from megatron_ttt.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[Path, list[str]]:
    """A directory with two shards, and their documents in order. One document is empty."""
    directory = tmp_path_factory.mktemp("shards")
    first, second = make_texts(150, seed=1), make_texts(100, seed=2)
    first[3] = ""
    write_shard(directory / "c4-train.00001-of-00002.json.gz", second)
    write_shard(directory / "c4-train.00000-of-00002.json.gz", first)
    return directory, first + second


@pytest.fixture(scope="session")
def tokenizer(shards, tmp_path_factory) -> SentencePieceTokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return SentencePieceTokenizer(train_tokenizer([f"{shards[0]}/*.gz"], str(prefix), 330))
