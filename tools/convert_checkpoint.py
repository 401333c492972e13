#!/usr/bin/env python3
"""Convert between checkpoints of this trainer and Hugging Face directories, verified both ways.

    tools/convert_checkpoint.py export --checkpoint runs/NAME/checkpoint-STEP --output HF_DIR
    tools/convert_checkpoint.py import --hf HF_DIR --output runs/NAME/checkpoint-0
    tools/convert_checkpoint.py import --jax FILE --config config.json --output DIR

A checkpoint of any layout is exported, and an imported one trains on at any layout
(`checkpoint.load=DIR`). Nothing is published unless weights, logits and greedy tokens agree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ttt.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    exporting = verbs.add_parser("export", help="a checkpoint to a Hugging Face directory")
    exporting.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint-STEP folder"
    )
    exporting.add_argument("--output", type=Path, required=True, help="folder to write")
    exporting.add_argument(
        "--tokenizer-model",
        type=Path,
        help=".model or tokenizer.json (default: the training data's)",
    )
    exporting.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16"),
        help="of all weights (default: each as it is stored)",
    )
    exporting.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest weights file, in 10^9 bytes"
    )
    importing = verbs.add_parser("import", help="official weights to a checkpoint")
    source = importing.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, help="config.json and *.safetensors or *.bin")
    source.add_argument("--jax", type=Path, help="the official JAX trainer's streaming checkpoint")
    importing.add_argument("--config", type=Path, help="with --jax: the model's config.json")
    importing.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    arguments = parser.parse_args()
    if arguments.verb == "import" and bool(arguments.jax) != bool(arguments.config):
        raise UserError("--jax and --config go together: the file does not say what model it is")
    return arguments


def main() -> None:
    """Convert."""
    arguments = parse_arguments()
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists: name a new folder")
    if arguments.verb == "export":
        from megatron_ttt.hf.exporter import export_checkpoint

        if not 0 < arguments.max_shard_gb < float("inf"):  # NaN is not
            raise UserError(f"--max-shard-gb {arguments.max_shard_gb}: give a number above 0")

        export_checkpoint(
            arguments.checkpoint,
            arguments.output,
            tokenizer_model=arguments.tokenizer_model,
            dtype=arguments.dtype,
            shard_bytes=int(arguments.max_shard_gb * 1e9),
        )
    elif arguments.jax:
        from megatron_ttt.hf.importer import import_jax

        import_jax(arguments.jax, arguments.config, arguments.output)
    else:
        from megatron_ttt.hf.importer import import_directory

        import_directory(arguments.hf, arguments.output)
    print(f"Verified and written: {arguments.output}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
