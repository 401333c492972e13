"""SentencePiece models at the speed of the package gigatoken, while it agrees with SentencePiece.

gigatoken reads control pieces that a text merely spells ("</s>", "<s>": a line of HTML) as the
control pieces themselves; such texts go to SentencePiece.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttt.data.tokenizer import SentencePieceTokenizer
from megatron_ttt.errors import UserError

_CACHE_TEXT = 256 << 20
"""Characters of text after which the tokenizer is made anew: its cache has no bound of its own."""


class GigatokenTokenizer(SentencePieceTokenizer):
    """A SentencePiece model (BPE with byte fallback) that `encode_batch` runs in gigatoken.

    `encode` stays SentencePiece's own: it is what `encode_batch` is held against.
    """

    def __init__(self, model_path: str | Path) -> None:
        super().__init__(model_path)
        if importlib.util.find_spec("gigatoken") is None:
            raise UserError(
                "--tokenizer-backend gigatoken needs the package gigatoken: pip install gigatoken"
            )
        # Loading takes a moment: a process that encodes nothing goes without.
        self._fast: Any = None
        self._text_left = 0

    def _load(self) -> None:
        import gigatoken

        self._fast = None  # never two of them at one time
        try:
            self._fast = gigatoken.Tokenizer.from_sentencepiece(self._model)
        except Exception as error:
            raise UserError(
                f"gigatoken cannot run {self.model_path} ({str(error).splitlines()[0]}); "
                "use --tokenizer-backend sentencepiece"
            ) from error
        self._text_left = _CACHE_TEXT
        control = {
            self._processor.id_to_piece(i)
            for i in range(self.vocab_size)
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        control.update(self._fast._special_tokens())
        self._control = re.compile("|".join(map(re.escape, sorted(control))))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._text_left <= 0:
            self._load()
        self._text_left -= sum(map(len, texts))
        return [
            np.array(self.encode(text), np.int32)
            if self._control.search(text)
            else self._fast.encode(text)
            for text in texts
        ]
