"""SentencePiece models at the speed of the package gigatoken, where it agrees with SentencePiece.

gigatoken gives other ids for many kinds of models: `difference` names what makes a model one of
them. It also reads control pieces that a text merely spells ("</s>", "<s>": a line of HTML) as the
control pieces themselves; such texts go to SentencePiece.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttt.data.tokenizer import SentencePieceTokenizer
from megatron_ttt.errors import UserError

_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPACE = "\u2581"
_RUN = 256
"""Spaces in a row, up to which the two are held against each other."""
_CACHE_TEXT = 256 << 20
"""Characters of text after which the tokenizer is made anew: its cache has no bound of its own."""


class GigatokenTokenizer(SentencePieceTokenizer):
    """A SentencePiece model that `encode_batch` runs in gigatoken.

    `encode` stays SentencePiece's own: it is what `encode_batch` is held against. Raises
    `UserError` for a model of a kind for which the two differ.
    """

    def __init__(self, model_path: str | Path) -> None:
        super().__init__(model_path)
        if importlib.util.find_spec("gigatoken") is None:
            raise UserError(
                "--tokenizer-backend gigatoken needs the package gigatoken: pip install gigatoken"
            )
        if reason := difference(self._model):
            raise self._refused(reason)
        # Loading takes a moment: a process that encodes nothing goes without.
        self._fast: Any = None
        self._text_left = 0

    def _refused(self, reason: str) -> UserError:
        return UserError(
            f"gigatoken cannot run {self.model_path} ({reason}); "
            "use --tokenizer-backend sentencepiece"
        )

    def _load(self) -> None:
        import gigatoken

        self._fast = None  # never two of them at one time
        try:
            self._fast = gigatoken.Tokenizer.from_sentencepiece(self._model)
        except Exception as error:
            raise self._refused(str(error).splitlines()[0]) from error
        for run in (" " * length for length in range(1, _RUN)):
            if self._fast.encode(run).tolist() != self.encode(run):
                raise self._refused("it gives other ids for runs of spaces")
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


def difference(model: bytes) -> str:
    """Why gigatoken may give other ids than SentencePiece for a model, "" where it does not.

    What is accepted is what a comparison of many odd texts found no difference for.
    """
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = content.trainer_spec, content.normalizer_spec
    kinds = {piece.type for piece in content.pieces}
    normal = {piece.piece for piece in content.pieces if piece.type == _NORMAL}
    reasons = {
        "it is not BPE": trainer.model_type != _BPE,
        "it has no byte fallback": not trainer.byte_fallback,
        "its spaces end words": trainer.treat_whitespace_as_suffix,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it normalises text": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it has user-defined or unused pieces": not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        # gigatoken merges pieces alone; SentencePiece begins with the characters of the text.
        "it has a piece with a character that is none": not set().union(*normal) <= normal,
        "some of its pieces have the same score": _has_ties(content.pieces),
        "two of its pieces spell a byte's": any(
            piece.piece[:cut] in normal and piece.piece[cut:] in normal
            for piece in content.pieces
            if piece.type == _BYTE
            for cut in range(1, len(piece.piece))
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _has_ties(pieces: Iterable) -> bool:
    """Whether two pieces that merge have the same score: which goes first is then up to the
    program. Runs of spaces are left out, which Llama's and Mistral's give one score."""
    merged = [piece for piece in pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    scores = Counter(piece.score for piece in merged)
    return any(scores[piece.score] > 1 and set(piece.piece) != {_SPACE} for piece in merged)
