"""Whether a tokenizer is the one that a checkpoint was trained with."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_ttt.checkpoint.run_folder import Checkpoint
from megatron_ttt.data.fingerprint import fingerprint
from megatron_ttt.errors import UserError


def check_trained_with(checkpoint: Checkpoint, file: Path, option: str, *, named: bool) -> None:
    """Refuse a file that is not the checkpoint's tokenizer; only warn of one that was named.

    option: what names another. Checkpoints that were imported, or trained without a tokenizer,
    have no fingerprint of one to compare with.
    """
    path = checkpoint.config.get("data", {}).get("tokenizer_model")
    recorded = path and checkpoint.state.get("data", {}).get(str(Path(path)))
    if not recorded or fingerprint(file) == recorded:
        return
    if not named:
        raise UserError(
            f"{file} is no longer the tokenizer that {checkpoint.path} was trained with: give that "
            f"one with {option}"
        )
    print(
        f"Warning: {file} is not the tokenizer that {checkpoint.path} was trained with",
        file=sys.stderr,
        flush=True,
    )
