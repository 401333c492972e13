#!/usr/bin/env python3
"""Rank the layouts of a recipe on a number of GPUs by their estimated step time.

    python tools/sweep_layouts.py --config yaml_recipes/ttt_mlp_1b.yaml --world-size 64 \\
        --gpu H100 --mfu 0.4 [--memory 70] [--top 10] [--json layouts.json] [key.path=value ...]

Every valid TP x PP x DP x micro-batch size that fits the memory is in the table; what the estimates
count is in docs/planning.md. The arguments to train with stand at the end of each line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ttt.config import load_config
from megatron_ttt.errors import UserError, refuse_missing_folders, run_command
from megatron_ttt.planning.cost import find_device
from megatron_ttt.planning.layouts import rank_layouts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", action="append", required=True, help="recipe, overlays after it"
    )
    parser.add_argument("--world-size", type=int, required=True, help="GPUs")
    parser.add_argument("--gpu", required=True, help="their name, as H100")
    parser.add_argument("--mfu", type=float, required=True, help="share of their peak, as 0.4")
    parser.add_argument("--memory", type=float, help="GiB of each to fill (default: 90%% of it)")
    parser.add_argument("--top", type=int, default=10, help="layouts to show (default: 10)")
    parser.add_argument("--json", type=Path, help="write all of them here")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    refuse_missing_folders(arguments.json)
    return arguments


def main() -> None:
    """Rank, print the table, write the JSON."""
    arguments = parse_arguments()
    if arguments.world_size < 1:
        raise UserError(f"--world-size {arguments.world_size} is no number of processes")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu} is no share: give a number up to 1, as 0.4")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: give 1 or more")
    device = find_device(arguments.gpu)
    memory = 0.9 * device.memory if arguments.memory is None else arguments.memory
    layouts = rank_layouts(config, arguments.world_size, device, arguments.mfu, memory)
    if not layouts:
        raise UserError(
            f"no layout of {arguments.world_size} GPUs fits {memory:g} GiB: give more GPUs or "
            "--memory"
        )
    print("  TP  PP    DP  micro  recompute   GiB  sent GiB  bubble  s/step  arguments")
    for layout in layouts[: arguments.top]:
        print(
            f"{layout.tensor:4d}{layout.pipeline:4d}{layout.data:6d}{layout.micro_batch_size:7d}"
            f"{'yes' if layout.recompute else 'no':>11s}{layout.memory_gib:6.1f}"
            f"{layout.sent_gib:10.2f}{layout.bubble:8.1%}{layout.step_seconds:8.3f}  "
            f"{' '.join(layout.overrides())}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([x.as_dict() for x in layouts], indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
