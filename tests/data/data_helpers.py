"""Shards of made-up documents, and pairs of .bin/.idx whose tokens are known."""

import gzip
import json
import random
from pathlib import Path

import numpy as np

from megatron_ttt.data.indexed import IndexedWriter

WORDS = ["the", "inner", "model", "learns", "at", "test", "time", "while", "café", "naïve", "北京"]
WORDS += ["2024", "\n\t", "", "[x]", "its", "weights"]


def make_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 120))) for _ in range(count)]


def write_shard(path: Path, texts: list[str]) -> Path:
    lines = [
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"test://{i}"})
        for i, text in enumerate(texts)
    ]
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_pair(prefix: Path, documents: list[np.ndarray], dtype: str = "<i4") -> str:
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for ids in documents:
        writer.append(np.asarray(ids, dtype).tobytes(), np.array([len(ids)], np.int32))
    writer.publish()
    return str(prefix)


def numbered_documents(count: int, seed: int, first_id: int = 0) -> list[np.ndarray]:
    """Documents of random length in which every token id occurs once: first_id, first_id + 1 ..."""
    lengths = np.random.default_rng(seed).integers(1, 90, count)
    return np.split(np.arange(first_id, first_id + lengths.sum()), np.cumsum(lengths)[:-1])


def pair(prefix: str | Path) -> tuple[bytes, bytes]:
    """The two files of a pair."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def byte_level_tokenizer(texts: list[str], vocab_size: int):
    """A tokenizer of the package tokenizers, with BOS and EOS, in the style of GPT-2's."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
