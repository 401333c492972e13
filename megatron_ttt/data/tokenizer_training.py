"""Training a SentencePiece model in the style of Llama's: BPE with byte fallback."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_ttt.data.partial_file import PartialFile, refuse_existing
from megatron_ttt.data.reader import MalformedLines, read_documents
from megatron_ttt.data.source import find_shards
from megatron_ttt.errors import UserError

# SentencePiece leaves out sentences above a size; pieces of this many characters stay below it.
_SENTENCE_CHARACTERS = 4000
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


def train_tokenizer(
    inputs: Sequence[str], output_prefix: str, vocab_size: int, *, overwrite: bool = False
) -> Path:
    """Train on all documents of the shards that match `inputs`; write and return `PREFIX.model`.

    unk is 0, bos 1, eos 2, then the 256 bytes; no pad. Digits stand alone, spaces and letters are
    kept as they are, a line break is the byte piece <0x0A>. The same documents give the same file.
    Raises `UserError` for a vocabulary that does not fit the text.
    """
    model_path = Path(f"{output_prefix}.model")
    refuse_existing([model_path], overwrite)
    # A list, not a stream: SentencePiece would hide the errors of reading among its own.
    sentences = list(_sentences(read_documents(find_shards(inputs), MalformedLines())))
    if not sentences:
        raise UserError(f"no documents in {', '.join(inputs)}; check --input")
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
        # SentencePiece puts its source line and the failed condition in front, in brackets.
        reason = str(error).split("] ")[-1]
        raise UserError(
            f"no tokenizer of {vocab_size} pieces from {', '.join(inputs)}: {reason} "
            "Change --vocab-size or give more text"
        ) from error
    output = PartialFile(model_path)
    try:
        output.stream.write(model.getvalue())
        output.flush()
        output.publish()
    finally:
        output.discard()
    return model_path


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]
