#!/usr/bin/env python3
"""Evaluate a checkpoint: validation loss, or the logits and gradients of given token ids.

    tools/evaluate.py --checkpoint runs/NAME/checkpoint-STEP [key.path=value ...]
    tools/evaluate.py --checkpoint DIR --input-ids ids.npy --save-logits logits.npy

Also under torchrun, at any layout (`parallel.tensor_model_parallel_size=2`, ...).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from megatron_ttt.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint-STEP folder")
    parser.add_argument("--dtype", choices=("float64", "float32"), help="default: as trained")
    parser.add_argument("--input-ids", type=Path, help=".npy of token ids [B, L]")
    parser.add_argument("--save-logits", type=Path, help=".npy to write: [B, L, V]")
    parser.add_argument(
        "--save-gradients",
        type=Path,
        help=".safetensors to write: gradients of the mean next-token cross-entropy",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.save_logits or arguments.save_gradients) and not arguments.input_ids:
        raise UserError("--save-logits and --save-gradients need --input-ids")
    return arguments


def main() -> None:
    """Evaluate; the result is one line of JSON."""
    arguments = parse_arguments()
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_ttt import evaluation
    from megatron_ttt.training.trainer import start

    config = evaluation.evaluation_config(arguments.checkpoint, arguments.overrides)
    platform = start(config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    evaluator = evaluation.Evaluator(config, platform, arguments.checkpoint, dtype)
    if arguments.input_ids is None:
        loss = evaluator.validation_loss()
        if dist.get_rank() == 0:
            print(json.dumps({"loss": loss, "perplexity": math.exp(loss)}))
    else:
        ids = evaluation.read_input_ids(arguments.input_ids, config.model.vocab_size)
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
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
