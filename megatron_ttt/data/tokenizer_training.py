"""Training a SentencePiece model in the style of Llama's: BPE with byte fallback."""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_ttt.data.atomic_file import PartialFile, refuse_existing, refuse_folder
from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.shards import find_shards
from megatron_ttt.errors import UserError

# SentencePiece leaves out sentences above a size; pieces of this many characters stay below it.
_SENTENCE_CHARACTERS = 4000
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS
MAX_BYTES = 1 << 28
"""Text to train on, by default. SentencePiece takes about four times its bytes in memory."""


def train_tokenizer(
    inputs: Sequence[str],
    output_prefix: str,
    vocab_size: int,
    *,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
) -> Path:
    """Train on the documents of the shards that match `inputs`; write and return `PREFIX.model`.

    Of the documents the first ones are read, in the order of the shards, up to `max_bytes` of text;
    what is left out is said on stderr. unk is 0, bos 1, eos 2, then the 256 bytes; no pad. Digits
    stand alone, spaces and letters are kept as they are, a line break is the byte piece <0x0A>. The
    same documents give the same file. Raises `UserError` for a shard that cannot be read and for a
    vocabulary that does not fit the text.
    """
    refuse_folder(output_prefix)
    model_path = Path(f"{output_prefix}.model")
    refuse_existing([model_path], overwrite)
    source = inputs[0] if len(inputs) == 1 else f"{inputs[0]} and {len(inputs) - 1} more"
    sentences = _Sentences(read_documents(find_shards(inputs), MalformedLines()), max_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if sentences.bytes and not sentences.error:
            # SentencePiece puts its source line and the failed condition in front, in brackets.
            reason = str(error).split("] ")[-1]
            raise UserError(
                f"no tokenizer of {vocab_size} pieces from {source}: {reason} "
                "Change --vocab-size or give more text"
            ) from error
    if sentences.error:
        raise sentences.error
    if not sentences.bytes:
        raise UserError(f"no text in {source} within {max_bytes} bytes; check --input, --max-bytes")
    output = PartialFile(model_path)
    try:
        output.stream.write(model.getvalue())
        output.flush()
        output.publish()
    finally:
        output.discard()
    return model_path


class _Sentences:
    """The lines of documents, up to a number of bytes.

    SentencePiece would hide an error of reading among its own: it ends the stream, and waits in
    `error`.
    """

    def __init__(self, documents: Iterable[str], max_bytes: int) -> None:
        self._documents, self._max_bytes = documents, max_bytes
        self.bytes = 0
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for number, document in enumerate(self._documents):
                size = len(document.encode())
                if self.bytes + size > self._max_bytes:
                    print(
                        f"training on the first {number:,} documents ({self.bytes / 1e6:,.1f} MB); "
                        "the rest is left out: --max-bytes",
                        file=sys.stderr,
                    )
                    return
                self.bytes += size
                for line in document.split("\n"):
                    for start in range(0, len(line), _SENTENCE_CHARACTERS):
                        yield line[start : start + _SENTENCE_CHARACTERS]
        except UserError as error:
            self.error = error
