#!/usr/bin/env python3
"""Convert checkpoints: official Hugging Face directories in.

tools/convert_checkpoint.py import --hf HF_DIR --output CHECKPOINT_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ttt.errors import run_command


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    importing = verbs.add_parser("import", help="an official directory to a checkpoint")
    importing.add_argument("--hf", type=Path, required=True, help="config.json and *.safetensors")
    importing.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    arguments = parser.parse_args()

    from megatron_ttt.hf.importer import import_directory

    import_directory(arguments.hf, arguments.output)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
