#!/usr/bin/env python3
"""Let a model write: from a prompt, a file, the keyboard, or token ids.

    tools/generate.py --checkpoint runs/NAME/checkpoint-STEP --prompt "The function returns"
    tools/generate.py --hf HF_DIR --interactive --temperature 0.8 --top-p 0.95
    tools/generate.py --checkpoint DIR --prompt-ids ids.npy --max-new-tokens 20 --greedy \\
        --save-ids out.npy

Text appears as it is written; the last line of stdout is one JSON object with tokens per second. A
checkpoint may be of any layout, and the command may run under torchrun at any: the model runs
whole, with its constant-memory cache, in rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from megatron_ttt.errors import UserError, refuse_missing_folders, run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a checkpoint-STEP folder")
    source.add_argument("--hf", type=Path, help="a Hugging Face directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from")
    prompt.add_argument("--prompt-file", type=Path, help="file of text to go on from")
    prompt.add_argument("--interactive", action="store_true", help="one prompt a line from stdin")
    prompt.add_argument("--prompt-ids", type=Path, help=".npy of token ids [B, L]")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float64", "float32"), help="default: as stored")
    parser.add_argument(
        "--save-ids", type=Path, help=".npy to write: prompt and new tokens, [B, L + new]"
    )
    parser.add_argument("--json", type=Path, help=".json to write: text, ids, tokens per second")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    refuse_missing_folders(arguments.json, arguments.save_ids)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: give 1 or more")
    if not 0 < arguments.top_p <= 1 or arguments.temperature <= 0 or arguments.top_k < 0:
        raise UserError(
            "sampling: --temperature must be above 0, --top-p in (0, 1], --top-k 0 or more"
        )
    return arguments


def main() -> None:
    """Generate on rank 0."""
    arguments = parse_arguments()
    from megatron_ttt import evaluation
    from megatron_ttt.config import check_layout

    if arguments.hf:
        config = evaluation.official_config(arguments.hf, arguments.overrides)
    else:
        config = evaluation.evaluation_config(str(arguments.checkpoint), arguments.overrides)
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") != "0":
        return
    writer = Writer(arguments, config)
    if arguments.prompt_ids:
        ids = evaluation.read_input_ids(arguments.prompt_ids, config.model.vocab_size)
        if ids.numel() == 0:
            raise UserError(f"{arguments.prompt_ids} holds no tokens: give one or more a row")
        writer.go_on(ids, None)
        return
    tokenizer = open_tokenizer(config, arguments.checkpoint)
    for text in prompts(arguments):
        writer.go_on(prompt_ids(tokenizer, text), tokenizer)


def prompts(arguments: argparse.Namespace):
    """The texts to go on from."""
    if arguments.prompt is not None:
        yield arguments.prompt
    elif arguments.prompt_file:
        try:
            yield arguments.prompt_file.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {arguments.prompt_file}: {error}") from None
    else:
        print("> ", end="", flush=True)
        for line in sys.stdin:
            yield line.rstrip("\n")
            print("> ", end="", flush=True)


def open_tokenizer(config, checkpoint: Path | None):
    """The tokenizer of the training data."""
    from megatron_ttt.checkpoint.run_folder import open_checkpoint
    from megatron_ttt.data.tokenizer import check_vocabulary, load_tokenizer
    from megatron_ttt.hf.tokenizer_check import check_trained_with

    if config.data.tokenizer_model is None:
        raise UserError("no tokenizer is known: set data.tokenizer_model=FILE")
    tokenizer = load_tokenizer(config.data.tokenizer_model)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if checkpoint is not None:
        trained = open_checkpoint(checkpoint)
        recorded = trained.config.get("data", {}).get("tokenizer_model")
        check_trained_with(
            trained,
            tokenizer.model_path,
            "data.tokenizer_model=FILE",
            named=config.data.tokenizer_model != recorded,
        )
    return tokenizer


def prompt_ids(tokenizer, text: str):
    """The ids of a prompt [1, L], behind BOS as in training."""
    import torch

    bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return torch.tensor([bos + tokenizer.encode(text)])


class Writer:
    """The model, and where what it writes goes."""

    def __init__(self, arguments: argparse.Namespace, config):
        import torch

        from megatron_ttt import platform as platforms
        from megatron_ttt.checkpoint.run_folder import open_whole_checkpoint
        from megatron_ttt.hf.loading import load_checkpoint, load_directory
        from megatron_ttt.stack import architecture_of

        self.arguments = arguments
        self.device = platforms.start(config.run.device).device
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        if arguments.hf:
            network = load_directory(arguments.hf, dtype)
        else:
            whole = open_whole_checkpoint(arguments.checkpoint)
            network = load_checkpoint(whole, architecture_of(config), dtype)
        self.network = network.to(self.device)

    def go_on(self, ids, tokenizer) -> None:
        """Write what comes after token ids [B, L]; text only for one row."""
        import numpy as np
        import torch

        arguments = self.arguments
        torch.manual_seed(arguments.seed)
        streamer, without_piece = None, []
        if tokenizer is not None:
            streamer = TerminalStreamer(tokenizer)
            # The model may have more rows than the tokenizer has pieces.
            without_piece = list(range(tokenizer.vocab_size, self.network.config.vocab_size))
        sampling = {"do_sample": False}
        if not arguments.greedy:
            sampling = {
                "do_sample": True,
                "temperature": arguments.temperature,
                "top_k": arguments.top_k,
                "top_p": arguments.top_p,
            }
        started = time.perf_counter()
        output = self.network.generate(
            ids.to(self.device),
            attention_mask=torch.ones_like(ids, device=self.device),
            max_new_tokens=arguments.max_new_tokens,
            eos_token_id=tokenizer.eos_id if tokenizer and tokenizer.eos_id >= 0 else None,
            pad_token_id=0,
            suppress_tokens=without_piece or None,
            streamer=streamer,
            **sampling,
        ).cpu()
        seconds = time.perf_counter() - started
        new = output.shape[1] - ids.shape[1]
        result = {
            "prompt_tokens": ids.shape[1],
            "new_tokens": new,
            "tokens_per_second": round(len(ids) * new / seconds, 1),
        }
        print(json.dumps(result), flush=True)
        if arguments.save_ids:
            np.save(arguments.save_ids, output.numpy())
        if arguments.json:
            if tokenizer is not None:
                result["text"] = tokenizer.decode(output[0].tolist())
            result["ids"] = output.tolist()
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


class TerminalStreamer:
    """transformers' streamer protocol: prints the prompt, then text as soon as it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.printed = tokenizer, [], ""

    def put(self, value) -> None:
        """The prompt's ids, or a new one."""
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        # A character may be some bytes short of whole.
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        """No more will come."""
        self._print(self.tokenizer.decode(self.ids))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text


if __name__ == "__main__":
    raise SystemExit(run_command(main))
