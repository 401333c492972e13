#!/usr/bin/env python
r"""Tokenize C4 shards into Megatron's `.bin`/`.idx`, and look after the result.

    python tools/preprocess_c4.py --input 'c4/en/c4-train.*.json.gz' --output-prefix data/c4-train \
        --tokenizer-model tokenizer.model --prepend-bos --append-eod --workers 16

writes `data/c4-train_text_document.bin` and `.idx`. The same command goes on where it was stopped.

    python tools/preprocess_c4.py verify --output-prefix data/c4-train    sizes, checksums, contents
    python tools/preprocess_c4.py stats --output-prefix data/c4-train     documents, tokens, lengths
    python tools/preprocess_c4.py peek --output-prefix data/c4-train      documents as text
    python tools/preprocess_c4.py merge --output-prefix data/c4-train     after the parts of --array
"""

import argparse
import signal
import sys

from megatron_ttt.data.signals import exit_on_signals
from megatron_ttt.errors import UserError, run_command

# What takes a second to import is imported by those who need it, once Ctrl-C ends in one line.


def main() -> None:
    exit_on_signals()
    verbs = {"verify": verify_command, "stats": stats_command, "peek": peek_command}
    verbs["merge"] = merge_command
    if len(sys.argv) > 1 and sys.argv[1] in verbs:
        parser = argparse.ArgumentParser(prog=f"preprocess_c4.py {sys.argv[1]}")
        # `peek ... | head` ends quietly, and so does Ctrl-C where nothing is written.
        for number in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        parser.add_argument("--output-prefix", required=True, help="as it was given to the build")
        verbs[sys.argv[1]](parser, sys.argv[2:])
    else:
        build_command(sys.argv[1:])


def build_command(arguments: list[str]) -> None:
    """No verb."""
    from megatron_ttt.data.local_engine import available_cpus
    from megatron_ttt.data.preprocess import ENGINES, SPLITS, preprocess
    from megatron_ttt.data.reader import MAX_DOCUMENT_BYTES
    from megatron_ttt.data.shard_jobs import ON_ERROR
    from megatron_ttt.data.tokenizer import BACKENDS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="shards: paths, globs, fsspec URLs; .json(l), .json(l).gz, .json(l).zst, .parquet",
    )
    add("--output-prefix", required=True, help="path of the output, no suffix")
    add("--tokenizer-model", required=True, help="SentencePiece .model file or tokenizer.json")
    add("--tokenizer-backend", choices=BACKENDS, help="default: by the model file's name")
    add("--json-keys", nargs="+", default=["text"], help="default: text")
    add("--append-eod", action="store_true", help="EOS after each document")
    add("--prepend-bos", action="store_true", help="BOS before each document")
    add("--split", choices=SPLITS, default="none", help="train and validation: by shard name, hash")
    add("--validation-fraction", type=float, default=0.0, help="of the documents; --split hash")
    add("--groups", type=int, default=1, help="pairs of consecutive shards; default: one for all")
    add("--on-error", choices=ON_ERROR, default="fail", help="bad lines and shards; default: fail")
    add("--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES, help="a longer line is bad")
    add("--workers", type=int, default=available_cpus(), help="processes; default: all cores")
    add("--engine", choices=ENGINES, default="local", help="ray: the cluster at RAY_ADDRESS")
    add("--array", metavar="I/N", help="do the I-th (from 0) of N ranges of shards; then: merge")
    add("--overwrite", action="store_true", help="replace existing output, at the end")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; give at least 1")
    preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer_model,
        backend=args.tokenizer_backend,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        split=args.split,
        validation_fraction=args.validation_fraction,
        groups=args.groups,
        max_document_bytes=args.max_document_bytes,
        on_error=args.on_error,
        engine=args.engine,
        workers=args.workers,
        array=_array(args.array),
        overwrite=args.overwrite,
    )


def _array(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        index, count = map(int, value.split("/"))
    except ValueError:
        raise UserError(f"--array is {value!r}; give I/N, the first of four parts is 0/4") from None
    return index, count


def verify_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    from megatron_ttt.data.verification import verify

    parser.add_argument("--tokenizer-model", help="default: the one of the build")
    parser.add_argument("--samples", type=int, default=64, help="documents held against the source")
    args = parser.parse_args(arguments)
    for line in verify(args.output_prefix, args.tokenizer_model, args.samples):
        print(line, flush=True)


def stats_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    from megatron_ttt.data.inspection import stats

    parser.add_argument("--plot", metavar="FILE.png", help="histograms of the lengths")
    args = parser.parse_args(arguments)
    print(stats(args.output_prefix, args.plot))


def peek_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    from megatron_ttt.data.inspection import peek

    parser.add_argument("--tokenizer-model", help="default: the one of the build")
    parser.add_argument("--first", type=int, default=0, help="number of the first document, from 0")
    parser.add_argument("--documents", type=int, default=3, help="how many; default: 3")
    args = parser.parse_args(arguments)
    for line in peek(args.output_prefix, args.tokenizer_model, args.first, args.documents):
        print(line)


def merge_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    from megatron_ttt.data.preprocess import merge
    from megatron_ttt.data.shard_jobs import ON_ERROR

    parser.add_argument("--on-error", choices=ON_ERROR, default="fail", help="accept what skipped")
    args = parser.parse_args(arguments)
    merge(args.output_prefix, args.on_error)


if __name__ == "__main__":
    sys.exit(run_command(main))
