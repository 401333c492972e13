"""A tokenizer as the files that transformers' AutoTokenizer reads.

Of a SentencePiece model, tokenizer.json holds the same pieces, merges and scores for the library
`tokenizers`, so that no SentencePiece is needed to use it; tokenizer.model stands beside it. What
comes out is compared with the tokenizer of the training data on sample texts before it is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from megatron_ttt.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_ttt.errors import UserError

_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_OWN = 16
"""So many of a model's own pieces are looked at; it may have hundreds, of one kind."""
_SAMPLES = (
    "Hello world, this is a test.",
    "  two spaces  inside   and at the end  ",
    "lines\nand\ttabs\r\n\n  indented",
    "Zürich, naïve, 東京, Ελληνικά, 🙂 𝔘nicode\u200b",
    "def f(x): return {'a': [1, 23, 456], \"b\": x ** 2}",
    "2026-01-31 3.14159 1,000,000",
    "a",
    "don't  they're ▁",
)


def write_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; a SentencePiece model too.

    Encoding puts BOS, where there is one, before a text, as training data has it before each
    document. Raises UserError for a model whose ids the `tokenizers` library does not reproduce.
    """
    ours = load_tokenizer(source)
    if isinstance(ours, HuggingFaceTokenizer):
        tokenizer, special = adopt(ours)
        own = []
    else:
        tokenizer, special = convert(source)
        own = _samples_of_own_pieces(_read(source), special)
        shutil.copyfile(source, folder / "tokenizer.model")
    _begin_with_bos(tokenizer, special)
    for text in (*_SAMPLES, *own):
        ids = ours.encode(text)
        if (got := tokenizer.encode(text, add_special_tokens=False).ids) != ids:
            raise UserError(
                f"{source} cannot be written for AutoTokenizer: {text!r} gives {got}, not {ids}"
            )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def adopt(ours: HuggingFaceTokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """The `tokenizers` tokenizer of a tokenizer.json, and its special tokens by role."""
    tokenizer = Tokenizer.from_file(str(ours.model_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {"bos": ours.bos_id, "eos": ours.eos_id, "pad": ours.pad_id}
    # A tokenizer without a pad token still has to pad batches; what stands there is masked out.
    ids["pad"] = ids["pad"] if ids["pad"] >= 0 else ids["eos"]
    special = {f"{role}_token": tokenizer.id_to_token(i) for role, i in ids.items() if i >= 0}
    return tokenizer, special


def convert(source: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The `tokenizers` tokenizer of a SentencePiece model, and its special tokens by role."""
    proto = _read(source)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    if trainer.model_type == _BPE:
        model = models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            _merges(proto),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == _UNIGRAM:
        model = models.Unigram(_scores(proto), trainer.unk_id, trainer.byte_fallback)
    else:
        raise UserError(f"{source} is neither a BPE nor a unigram model")
    tokenizer = Tokenizer(model)
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(after)

    special = {"unk_token": trainer.unk_piece}
    for role in ("bos", "eos", "pad"):
        number = getattr(trainer, f"{role}_id")
        if 0 <= number < len(pieces):
            special[f"{role}_token"] = pieces[number]
    # A model without a pad piece still has to pad batches; what stands there is masked out.
    special.setdefault("pad_token", special.get("eos_token", trainer.unk_piece))
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special.values()]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False)
            for piece in proto.pieces
            if piece.type == _USER_DEFINED
        ]
    )
    return tokenizer, special


def _begin_with_bos(tokenizer: Tokenizer, special: dict[str, str]) -> None:
    """As training data has it, whatever a tokenizer.json would add."""
    bos = [special["bos_token"]] if "bos_token" in special else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A"],
        pair=[*bos, "$A", *bos, "$B"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in bos],
    )


def _read(source: Path):
    """The model as sentencepiece_model.proto describes it."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source.read_bytes())
    return proto


def _samples_of_own_pieces(proto, special: dict[str, str]) -> list[str]:
    """With pieces that its trainer was told to keep whole, at every place in a text, and with what
    a text may spell without meaning the piece."""

    def pieces(kind: int) -> list[str]:
        own = [piece.piece for piece in proto.pieces if piece.type == kind]
        return [piece for piece in own if piece not in special.values()][:_OWN]

    own = pieces(_USER_DEFINED) + pieces(_CONTROL) + pieces(_BYTE)[-1:]
    texts = ("x{}y", "{}x", "x {} y", "x{}", "x\n{} y")
    return [text.format(piece.replace("▁", " ")) for piece in own for text in texts]


def _scores(proto) -> list[tuple[str, float]]:
    """A unigram model's pieces, scored so that a text never becomes a control piece or a byte's
    name: SentencePiece does not look for those, `tokenizers` knows all pieces alike.

    They score 0, and every character of another piece is worth more than they are. That is the
    same for each way to cut a text, so it decides nothing among those pieces. A character without
    a piece, which `tokenizers` scores 10 below the lowest, stays below them.
    """
    spelled = [piece.type in (_NORMAL, _USER_DEFINED) for piece in proto.pieces]
    longest = max(len(p.piece) for p, is_spelled in zip(proto.pieces, spelled) if not is_spelled)
    worth = 10 * longest + 1 - min(piece.score for piece in proto.pieces)
    return [
        (piece.piece, piece.score + worth * len(piece.piece) if is_spelled else 0.0)
        for piece, is_spelled in zip(proto.pieces, spelled)
    ]


def _merges(proto) -> list[tuple[str, str]]:
    """BPE merges in the order SentencePiece takes them: by the score of what they make."""
    score = {piece.piece: piece.score for piece in proto.pieces}
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for word in (piece.piece for piece in proto.pieces if piece.type == _NORMAL):
        splits = ((word[:i], word[i:]) for i in range(1, len(word)))
        pairs = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return sorted(merges, key=lambda pair: -score["".join(pair)])


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)
