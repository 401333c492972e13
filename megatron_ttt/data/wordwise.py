"""SentencePiece word by word, from a memory of words: the same ids, several times faster.

Text is cut in front of its spaces. SentencePiece itself puts a space, written "\u2581", in front of
a text and merges pieces wherever the merged one is in the vocabulary. Where no piece has a "\u2581"
behind another character, nothing is ever merged across a cut: the ids of a text are those of its
words, one after the other, and most words of a text have been met before.
"""

import re
from array import array
from collections.abc import Iterator

import numpy as np
import sentencepiece

_SPACE = "\u2581"
_BPE = 2
_WORDS = 1 << 16
"""Words that are remembered, the first ones met; with their ids they take about 12 MB."""
_WORD_CHARACTERS = 32
_STRETCH_CHARACTERS = 1 << 16

_cut = re.compile(f"(?<=[^ {_SPACE}]) ")
_goes_beyond = re.compile(f" |[^{_SPACE}]{_SPACE}").search


class WordwiseEncoder(dict):
    """Encodes texts with a SentencePiece model for which `is_wordwise` holds.

    As a dictionary it holds the ids of words, without the space in front of them, as bytes.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._type = "H" if processor.get_piece_size() <= 1 << 16 else "i"
        # Behind a space at the end of a text nothing follows: the space stands for itself.
        self[""] = array(self._type, [processor.piece_to_id(_SPACE)]).tobytes()

    def __missing__(self, word: str) -> bytes:
        ids = array(self._type, self._processor.encode(word)).tobytes()
        if len(word) <= _WORD_CHARACTERS and len(self) < _WORDS:
            self[word] = ids
        return ids

    def encode(self, text: str) -> np.ndarray:
        """Token ids, as an integer array [tokens]."""
        if not text:
            return np.zeros(0, self._type)
        parts = [self._encode_stretch(stretch) for stretch in _stretches(text)]
        return np.frombuffer(b"".join(parts), self._type)

    def _encode_stretch(self, text: str) -> bytes:
        # The plain split also cuts between two spaces, written either way: they may be one piece.
        plain = "  " not in text and _SPACE not in text and not text.startswith(" ")
        return b"".join(map(self.__getitem__, text.split(" ") if plain else _cut.split(text)))


def _stretches(text: str) -> Iterator[str]:
    """The text in stretches that end where it may be cut: a list of all its words would take many
    times its bytes."""
    start = 0
    while start <= len(text):
        cut = _cut.search(text, start + _STRETCH_CHARACTERS)
        stop = cut.start() if cut else len(text)
        yield text[start:stop]
        start = stop + 1


def is_wordwise(model: bytes, processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words: a BPE model that takes characters as they
    are, puts a space in front of a text, and has no piece that goes beyond the end of a word."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = content.trainer_spec, content.normalizer_spec
    return (
        trainer.model_type == _BPE
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and processor.piece_to_id(_SPACE) != processor.unk_id()
        and not any(_goes_beyond(piece.piece) for piece in content.pieces)
    )
