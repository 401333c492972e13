#!/usr/bin/env python3
"""Evaluate a model: validation loss, also by token position, or the logits of given token ids.

    tools/evaluate.py --checkpoint runs/NAME/checkpoint-STEP [key.path=value ...]
    tools/evaluate.py --hf HF_DIR data.validation=PREFIX --json out.json --plot by_position.png
    tools/evaluate.py --checkpoint DIR --input-ids ids.npy --save-logits logits.npy
    tools/evaluate.py --checkpoint DIR --inner-loop   (the health of every TTT layer, as a table)

Also under torchrun, at any layout (`parallel.tensor_model_parallel_size=2`, ...). The last line of
stdout is one JSON object; the losses by position are in --json's file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ttt.errors import UserError, refuse_missing_folders, run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="a checkpoint-STEP folder")
    source.add_argument("--hf", type=Path, help="a Hugging Face directory")
    parser.add_argument("--dtype", choices=("float64", "float32"), help="default: as stored")
    parser.add_argument("--json", type=Path, help=".json to write: results, losses by position")
    parser.add_argument("--plot", type=Path, help=".png to write: perplexity by token position")
    parser.add_argument("--input-ids", type=Path, help=".npy of token ids [B, L]")
    parser.add_argument("--save-logits", type=Path, help=".npy to write: [B, L, V]")
    parser.add_argument(
        "--save-gradients",
        type=Path,
        help=".safetensors to write: gradients of the mean next-token cross-entropy",
    )
    parser.add_argument(
        "--inner-loop",
        action="store_true",
        help="print each TTT layer's inner losses, learning rates and state, on --input-ids or the "
        "first validation batch",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.save_logits or arguments.save_gradients) and not arguments.input_ids:
        raise UserError("--save-logits and --save-gradients need --input-ids")
    if (arguments.json or arguments.plot) and arguments.input_ids:
        raise UserError("--json and --plot are of the validation loss, not of --input-ids")
    written = ("json", "plot", "save_logits", "save_gradients")
    refuse_missing_folders(*(getattr(arguments, name) for name in written))
    if arguments.inner_loop and arguments.hf:
        raise UserError("--inner-loop looks into a --checkpoint: import the directory first")
    return arguments


def main() -> None:
    """Evaluate."""
    arguments = parse_arguments()
    import torch
    import torch.distributed as dist

    from megatron_ttt import evaluation
    from megatron_ttt.process import prepare_process

    if arguments.hf:
        config = evaluation.official_config(arguments.hf, arguments.overrides)
    else:
        config = evaluation.evaluation_config(arguments.checkpoint, arguments.overrides)
    platform = prepare_process(config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.hf:
        evaluator = evaluation.OfficialEvaluator(arguments.hf, platform, dtype)
    else:
        evaluator = evaluation.Evaluator(config, platform, arguments.checkpoint, dtype)
    if arguments.inner_loop:
        print_inner_loop(arguments, evaluator, config)
    elif arguments.input_ids is None:
        result = evaluation.measure(evaluator, config)
        if dist.get_rank() == 0:
            write_result(arguments, result)
    else:
        write_outputs(arguments, evaluator, config.model.vocab_size)
    dist.barrier()
    dist.destroy_process_group()


def print_inner_loop(arguments: argparse.Namespace, evaluator, config) -> None:
    """The table of every layer; its figures by name are the last line."""
    import torch.distributed as dist

    from megatron_ttt.data.batches import open_data
    from megatron_ttt.evaluation import read_input_ids
    from megatron_ttt.stack import architecture_of
    from megatron_ttt.training.inner_loop import inner_metrics, inner_table, observe_inner_loop

    if not architecture_of(config).has_inner_loop:
        raise UserError(f"{arguments.checkpoint} has no layer with an inner loop")
    if arguments.input_ids:
        ids = read_input_ids(arguments.input_ids, config.model.vocab_size)
    elif batches := open_data(config, train=False).validation_batches():
        ids = batches[0][:, :-1]
    else:
        raise UserError("data.validation is not set: name what to look at, or give --input-ids")
    seen = observe_inner_loop(evaluator.chunks, lambda: evaluator.logits(ids))
    if dist.get_rank() == 0:
        print(inner_table(seen))
        print(json.dumps(inner_metrics(seen)))


def write_result(arguments: argparse.Namespace, result: dict) -> None:
    """The figures of `evaluation.measure`, where the command line wants them."""
    from megatron_ttt.evaluation import plot_by_position

    model = str(arguments.hf or arguments.checkpoint)
    by_position = result.pop("loss_by_position")
    print(json.dumps(result), flush=True)  # first: what took hours is not lost to a disk
    if arguments.json:
        with writing(arguments.json):
            whole = {"model": model, **result, "loss_by_position": by_position}
            arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.plot:
        with writing(arguments.plot):
            plot_by_position(by_position, arguments.plot)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file that cannot be written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_outputs(arguments: argparse.Namespace, evaluator, vocab_size: int) -> None:
    """Logits and gradients of --input-ids."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_ttt import evaluation

    ids = evaluation.read_input_ids(arguments.input_ids, vocab_size)
    if arguments.save_logits:
        logits = evaluator.logits(ids)
        if evaluation.is_last_stage_writer():
            wide = torch.promote_types(logits.dtype, torch.float32)
            np.save(arguments.save_logits, logits.to("cpu", wide).numpy())
    if arguments.save_gradients:
        gradients = evaluator.gradients(ids)
        if dist.get_rank() == 0:
            from safetensors.torch import save_file

            save_file(
                {name: gradient.contiguous() for name, gradient in gradients.items()},
                arguments.save_gradients,
            )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
