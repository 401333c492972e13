"""What turns a block of lines into bytes: the options of a run and the work of one process."""

import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

import numpy as np

from megatron_ttt.data.indexed import token_dtype
from megatron_ttt.data.reader import MAX_DOCUMENT_BYTES, Block, parse_block
from megatron_ttt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ttt.errors import UserError

_CHECKED_LINES = 128
"""With gigatoken, SentencePiece encodes the first document and then each so many-th line too."""
_MMAP_THRESHOLD = -3
_LARGE_BUFFER = 1 << 20


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the output, for a given input.

    `split` is one of "none", "name" (by C4's own shard names) and "hash" (`validation_fraction` of
    the documents, by a hash of the first key's text); `groups` is the number of pairs for each
    split, each of consecutive shards.
    """

    tokenizer_model: str
    backend: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    split: str = "none"
    validation_fraction: float = 0.0
    groups: int = 1
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def streams(self) -> tuple[tuple[str, str], ...]:
        """(split, key) of what a shard becomes; the split is "" unless documents are split."""
        splits = ("train", "validation") if self.split == "hash" else ("",)
        return tuple((split, key) for split in splits for key in self.json_keys)

    def fingerprint(self, tokenizer: Tokenizer) -> dict:
        """The options as they are compared: the tokenizer by its content, not by its path. BOS and
        EOS are named beside it: a file of its own may say which they are."""
        options = asdict(self) | {"json_keys": list(self.json_keys), "tokenizer": tokenizer.sha256}
        del options["tokenizer_model"]
        facts = ("vocab_size", "bos_id", "eos_id")
        return options | {name: getattr(tokenizer, name) for name in facts}

    @staticmethod
    def from_fingerprint(fingerprint: dict, tokenizer_model: str) -> "Options":
        """The options of a finished run."""
        names = {field.name for field in fields(Options)} & set(fingerprint)
        options = {name: fingerprint[name] for name in names}
        options["json_keys"] = tuple(options["json_keys"])
        return Options(tokenizer_model=tokenizer_model, **options)


@dataclass(frozen=True)
class EncodedBlock:
    """Documents in bytes: for each stream of the options (tokens, lengths int32 [documents])."""

    streams: list[tuple[bytes, np.ndarray]]
    position: int
    documents: int
    text_bytes: int
    empty: int
    malformed: list[tuple[int, str]]
    refused: int
    """The line that gigatoken encodes otherwise than SentencePiece, or 0."""


class Encoder:
    """A document becomes its ids, BOS before and EOS after, unless it has no ids at all."""

    def __init__(self, options: Options) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _give_large_buffers_back()
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer_model, options.backend)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self._bos = self._control(options.prepend_bos, self.tokenizer.bos_id, "BOS", "prepend-bos")
        self._eod = self._control(options.append_eod, self.tokenizer.eos_id, "EOS", "append-eod")
        # A fast backend is held against its own `encode`, which is SentencePiece's.
        self._checked = options.backend == "gigatoken"

    def _control(self, wanted: bool, control_id: int, name: str, flag: str) -> list[np.ndarray]:
        if wanted and control_id < 0:
            raise UserError(
                f"{self.options.tokenizer_model} has no {name} piece; leave --{flag} out"
            )
        return [np.array([control_id], np.int32)] if wanted else []

    def encode(self, block: Block) -> EncodedBlock:
        """Parse and encode one block."""
        options = self.options
        malformed: list[tuple[int, str]] = []
        documents = list(
            parse_block(
                block,
                options.json_keys,
                lambda line, reason: malformed.append((line, reason)),
                options.max_document_bytes,
            )
        )
        lines = [line for line, _ in documents]
        encoded, text_bytes, empty, refused = [], 0, 0, 0
        for texts in zip(*(texts for _, texts in documents)):
            texts = list(texts)
            ids = self.tokenizer.encode_batch(texts)
            if self._checked:
                begins = block.first_line == 1
                refused = refused or self._first_difference(begins, lines, texts, ids)
            encoded.append(ids)
            text_bytes += sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
            empty += sum(len(i) == 0 for i in ids)
        encoded = encoded or [[] for _ in options.json_keys]
        chosen = [self.split_of(texts) for _, texts in documents]
        columns = dict(zip(options.json_keys, encoded))
        streams = [
            [ids for ids, document_split in zip(columns[key], chosen) if document_split == split]
            for split, key in options.streams
        ]
        return EncodedBlock(
            streams=[self._pack(ids) for ids in streams],
            position=block.position,
            documents=len(documents),
            text_bytes=text_bytes,
            empty=empty,
            malformed=malformed,
            refused=refused,
        )

    def _first_difference(
        self, begins: bool, lines: Sequence[int], texts: Sequence[str], ids: Sequence[np.ndarray]
    ) -> int:
        """The first line of the sample where SentencePiece gives other ids, 0 if none does."""
        for index, (line, text, fast) in enumerate(zip(lines, texts, ids)):
            sampled = line % _CHECKED_LINES == 1 or (begins and index == 0)
            if sampled and self.tokenizer.encode(text) != fast.tolist():
                return line
        return 0

    def split_of(self, texts: Sequence[str]) -> str:
        """The split of a document, by the hash of its first text; "" where none is asked for."""
        if self.options.split != "hash":
            return ""
        digest = hashlib.blake2b(texts[0].encode(), digest_size=8).digest()
        chosen = int.from_bytes(digest, "big") < self.options.validation_fraction * 2**64
        return "validation" if chosen else "train"

    def encode_text(self, text: str) -> list[int]:
        """One document, as it is written."""
        tokens, _ = self._pack([np.array(self.tokenizer.encode(text), np.int32)])
        return np.frombuffer(tokens, self.dtype).tolist()

    def _pack(self, column: list[np.ndarray]) -> tuple[bytes, np.ndarray]:
        parts: list[np.ndarray] = []
        for ids in column:
            parts += [*self._bos, ids, *self._eod] if len(ids) else []
        extra = len(self._bos) + len(self._eod)
        lengths = np.array([len(ids) + extra if len(ids) else 0 for ids in column], np.int32)
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return tokens.astype(self.dtype).tobytes(), lengths


def _give_large_buffers_back() -> None:
    """What a long document needs goes back to the system behind it, where the C library is glibc.

    Left alone, glibc takes ever larger buffers out of its heap, which their holes keep large.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BUFFER)


def encode_here(blocks: Iterable, encoder: Encoder) -> Iterator:
    """Encode every `Block` of a stream in this process; other items pass."""
    for item in blocks:
        yield encoder.encode(item) if isinstance(item, Block) else item
