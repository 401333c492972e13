"""Whether a dataset was made with the tokenizer, and for the vocabulary, of a run."""

from pathlib import Path

import numpy as np

from megatron_ttt.data.build_folder import load_json
from megatron_ttt.data.indexed import bin_path, check_ids, open_indexed
from megatron_ttt.data.tokenizer import Tokenizer
from megatron_ttt.errors import UserError

_MANIFEST = ".manifest.json"
_LOOKED_AT = 1 << 20
"""Tokens at the beginning of a dataset, and at its end: milliseconds, however big it is."""


def check_made_with(prefix: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a pair that was made with another tokenizer: by its manifest, where there is one, and
    by its first and last ids. Raises `UserError` too for a pair that `open_indexed` refuses."""
    index = open_indexed(prefix)
    final = _final_manifest(Path(prefix))
    if final is not None:
        if tokenizer.sha256 != final["options"]["tokenizer"]:
            raise UserError(
                f"{prefix} was not made with data.tokenizer_model={tokenizer.model_path}, but with "
                f"what {final['tokenizer_model']} was then: set that, or run the preprocessing "
                "again"
            )
        check_control_ids(tokenizer, final)
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    for ids in (tokens[:_LOOKED_AT], tokens[-_LOOKED_AT:]):
        check_ids(prefix, ids, vocab_size)


def check_control_ids(tokenizer: Tokenizer, final: dict) -> None:
    """Refuse a tokenizer that has other control tokens than it had in a build."""
    for name in ("bos_id", "eos_id"):
        if getattr(tokenizer, name) != final["options"][name]:
            raise UserError(
                f"{tokenizer.model_path} has the {name} {getattr(tokenizer, name)}, in the build "
                f"it was {final['options'][name]}: its tokenizer_config.json has changed"
            )


def _final_manifest(prefix: Path) -> dict | None:
    """The manifest beside a pair that lists it as an output of its build."""
    for path in sorted(prefix.parent.glob(f"*{_MANIFEST}")):
        if prefix.name.startswith(path.name.removesuffix(_MANIFEST)):
            try:
                final = load_json(path)
            except UserError:
                continue  # another program's, or half a copy: the ids are still looked at
            if final is not None and prefix.name in final.get("outputs", ()):
                return final
    return None
