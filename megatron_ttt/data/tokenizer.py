"""The SentencePiece tokenizer, as the data pipeline, the datasets and generation see it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_ttt.errors import UserError


class SentencePieceTokenizer:
    """A SentencePiece model file, e.g. the Llama-2 tokenizer.

    `vocab_size` is the number of pieces; `bos_id`, `eos_id` and `pad_id` are -1 where the model
    has no such piece. Raises `UserError` for a missing or broken model file.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = Path(model_path)
        try:
            model = self.model_path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer model {model_path}: {error.strerror}"
            ) from error
        try:
            # An empty file would be accepted as a processor without a model.
            if not model:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{model_path} is not a SentencePiece model; give the path of a .model file"
            ) from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        self.unique_identifiers = {
            "class": type(self).__name__,
            "sha256": hashlib.sha256(model).hexdigest(),
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control pieces such as BOS and EOS vanish."""
        return self._processor.decode([int(i) for i in ids])


def check_vocabulary(tokenizer: SentencePieceTokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with more pieces than the model's embedding has rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.model_path} has {tokenizer.vocab_size} pieces, the model's "
            f"vocabulary {vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
        )
