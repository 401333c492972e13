"""Tokenizers behind one interface, as the data pipeline, the datasets and generation see them."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ttt.data.wordwise import WordwiseEncoder, is_wordwise
from megatron_ttt.errors import UserError

BACKENDS = ("sentencepiece", "huggingface", "gigatoken")
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "pad": ("<pad>", "<|pad|>"),
}


class Tokenizer:
    """What every tokenizer offers.

    `vocab_size` is the number of pieces; `bos_id`, `eos_id` and `pad_id` are -1 where the model
    has no such piece. Text never becomes a control piece, whatever it spells.
    """

    model_path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unique_identifiers: dict[str, str]

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = Path(model_path)
        try:
            self._model = self.model_path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer model {model_path}: {error.strerror}"
            ) from error
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self.unique_identifiers = {"class": type(self).__name__, "sha256": self.sha256}

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without BOS and EOS, as integer arrays [tokens]."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control pieces such as BOS and EOS vanish."""
        raise NotImplementedError

    def normalize(self, text: str) -> str:
        """The text as decoding its ids gives it back, but for spaces at its beginning."""
        return self.decode(self.encode(text))

    def is_lossless(self, ids: Sequence[int]) -> bool:
        """Whether the ids keep all of the text: none stands for an unknown piece."""
        return True


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file, e.g. the Llama-2 tokenizer.

    Raises `UserError` for a missing or broken model file.
    """

    def __init__(self, model_path: str | Path) -> None:
        super().__init__(model_path)
        try:
            # An empty file would be accepted as a processor without a model.
            if not self._model:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(
                f"{model_path} is not a SentencePiece model; give the path of a .model file"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.pad_id = self._processor.pad_id()

    @cached_property
    def _wordwise(self) -> WordwiseEncoder | None:
        if not is_wordwise(self._model, self._processor):
            return None
        return WordwiseEncoder(self._processor)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._wordwise is not None:
            return [self._wordwise.encode(text) for text in texts]
        return self._processor.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def is_lossless(self, ids: Sequence[int]) -> bool:
        return self._processor.unk_id() not in ids

    def normalize(self, text: str) -> str:
        return self._processor.normalize(text).replace("▁", " ")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the package tokenizers.

    BOS, EOS and PAD are the ones that a `tokenizer_config.json` beside it names, else the usual
    names. A control token that stands in a text is encoded as the characters it is made of.
    """

    def __init__(self, model_path: str | Path) -> None:
        super().__init__(model_path)
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{model_path} needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._model.decode())
        except Exception as error:
            raise UserError(
                f"{model_path} is not a tokenizer.json: {str(error).splitlines()[0]}"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        names = self._names()
        self.bos_id, self.eos_id, self.pad_id = map(names.get, ("bos", "eos", "pad"))
        for control_id in {self.bos_id, self.eos_id, self.pad_id} - {-1}:
            self._refuse_as_text(control_id)

    def _refuse_as_text(self, control_id: int) -> None:
        """`encode_special_tokens` is of those that the file calls special, and not of those that
        the model has as a piece too."""
        name = self._tokenizer.id_to_token(control_id)
        if control_id not in self.encode(name):
            return
        added = self._tokenizer.get_added_tokens_decoder().get(control_id)
        remedy = 'set "special": true for it under "added_tokens" there'
        if added is not None and added.special:
            remedy = (
                "it is a piece of the model itself: take the SentencePiece file that this one was "
                "made from, where there is one, else a BPE tokenizer"
            )
        raise UserError(
            f"{self.model_path}: a text that spells the control token {name!r} becomes it; {remedy}"
        )

    def _names(self) -> dict[str, int]:
        path = config_path(self.model_path)
        try:
            config = json.loads(path.read_bytes()) if path.exists() else {}
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        ids = {}
        for kind, usual in _USUAL_NAMES.items():
            named = config.get(f"{kind}_token")
            named = named.get("content") if isinstance(named, dict) else named
            if not isinstance(named, str | None):
                raise UserError(f"{path}: {kind}_token is {named!r}, no name of a token")
            candidates = (named,) if named or config else usual
            found = [self._tokenizer.token_to_id(name) for name in candidates if name]
            ids[kind] = next((i for i in found if i is not None), -1)
        return ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def config_path(model_path: str | Path) -> Path:
    """The file beside a tokenizer.json that names its control tokens."""
    return Path(model_path).with_name("tokenizer_config.json")


def default_backend(model_path: str | Path) -> str:
    """A .json is Hugging Face's, every other file SentencePiece's."""
    return "huggingface" if str(model_path).endswith(".json") else "sentencepiece"


def load_tokenizer(model_path: str | Path, backend: str | None = None) -> Tokenizer:
    """The tokenizer in a file. Raises `UserError` for a file that the backend cannot read."""
    backend = backend or default_backend(model_path)
    if backend == "gigatoken":
        from megatron_ttt.data.gigatoken_backend import GigatokenTokenizer

        return GigatokenTokenizer(model_path)
    kinds = {"sentencepiece": SentencePieceTokenizer, "huggingface": HuggingFaceTokenizer}
    return kinds[backend](model_path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with more pieces than the model's embedding has rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.model_path} has {tokenizer.vocab_size} pieces, the model's "
            f"vocabulary {vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
        )
