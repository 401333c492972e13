#!/usr/bin/env python
r"""Train a SentencePiece tokenizer (BPE, byte fallback) on C4 shards.

    python tools/train_tokenizer.py --input 'c4/en/c4-train.0000?-of-01024.json.gz' \
        --vocab-size 32000 --output-prefix data/tokenizer

writes `data/tokenizer.model`.
"""

import argparse
import sys

from megatron_ttt.data.tokenizer_training import MAX_BYTES, train_tokenizer
from megatron_ttt.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="C4 shards")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces")
    parser.add_argument("--output-prefix", required=True, help="path of the model, no suffix")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="of text to train on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    args = parser.parse_args()
    train_tokenizer(
        args.input,
        args.output_prefix,
        args.vocab_size,
        max_bytes=args.max_bytes,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
