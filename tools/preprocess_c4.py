#!/usr/bin/env python
"""Tokenize C4 shards into Megatron's `.bin`/`.idx`.

    python tools/preprocess_c4.py --input 'c4/en/c4-train.*.json.gz' --output-prefix data/c4-train \
        --tokenizer-model tokenizer.model --prepend-bos --append-eod --workers 16

writes `data/c4-train_text_document.bin` and `.idx`.
"""

import argparse
import sys

from megatron_ttt.data.preprocess import available_cpus, preprocess
from megatron_ttt.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="C4 shards")
    parser.add_argument("--output-prefix", required=True, help="path of the output, no suffix")
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece .model file")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="default: text")
    parser.add_argument("--append-eod", action="store_true", help="EOS after each document")
    parser.add_argument("--prepend-bos", action="store_true", help="BOS before each document")
    parser.add_argument(
        "--workers", type=int, default=available_cpus(), help="processes; default: all cores"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; give at least 1")
    preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer_model,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        workers=args.workers,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
