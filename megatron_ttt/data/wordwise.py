"""SentencePiece word by word, from a memory of words: the same ids, several times faster.

Text is cut in front of its spaces. SentencePiece itself puts a space, written "\u2581", in front of
a text and merges pieces wherever the merged one is in the vocabulary. Where no piece has a "\u2581"
behind another character, nothing is ever merged across a cut: the ids of a text are those of its
words, one after the other, and most words of a text have been met before.
"""

import re
from array import array

import numpy as np
import sentencepiece

_SPACE = "\u2581"
_BPE = 2
_WORDS = 1 << 16
"""Words that are remembered, the first ones met; with their ids they take about 12 MB."""
_WORD_CHARACTERS = 32

_split = re.compile("(?<=[^ ]) ").split
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
        if not text or _SPACE in text:
            return np.array(self._processor.encode(text), self._type)
        # A cut between two spaces might part a piece that is made of spaces.
        plain = "  " not in text and text[0] != " "
        words = text.split(" ") if plain else _split(text)
        return np.frombuffer(b"".join(map(self.__getitem__, words)), self._type)


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
