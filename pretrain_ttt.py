#!/usr/bin/env python3
"""Train a TTT language model.

    torchrun --nproc-per-node N pretrain_ttt.py --config yaml_recipes/NAME.yaml [key.path=value ...]

Without torchrun it is a job of one process. `--print-config` shows the resolved configuration,
`--dry-run` what it would cost (docs/planning.md); neither starts anything. `--build-index` builds
the sample index that training would build first, on one machine without a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
from pathlib import Path

from megatron_ttt.config import check_layout, load_config, to_yaml
from megatron_ttt.errors import EXIT_STOPPED, UserError, run_command
from megatron_ttt.training.stopping import LAUNCHER_WAS_KILLED, StopRequests


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", action="append", required=True, help="recipe; repeat it to lay overlays over it"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved YAML")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, train nothing")
    parser.add_argument("--build-index", action="store_true", help="build the index and end")
    parser.add_argument(
        "--world-size", type=int, help="processes to plan for (default: the recipe's TP x PP)"
    )
    parser.add_argument("--gpu", help="device to plan for, as H100: says what fits it")
    parser.add_argument("--mfu", type=float, help="with --gpu: share of its peak, for the time")
    parser.add_argument("--memory", type=float, help="with --gpu: GiB of it to fill (default: all)")
    return parser.parse_intermixed_args()


def main() -> int:
    """Read the arguments and do what they say; the exit code (docs/checkpoints.md)."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    if arguments.dry_run:
        from megatron_ttt.planning import describe, dry_run

        plan = dry_run(
            config,
            arguments.world_size,
            gpu=arguments.gpu,
            mfu=arguments.mfu,
            memory_gib=arguments.memory,
        )
        print(describe(config, plan))
        print(json.dumps(plan))
        return 0

    plans = ("world_size", "gpu", "mfu", "memory")
    if given := [name for name in plans if getattr(arguments, name) is not None]:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{options} plan a run and train none: add --dry-run, or leave them out")
    if arguments.build_index:
        from megatron_ttt.data.batches import build_index, index_folder

        for name, windows in zip(("train", "validation"), build_index(config)):
            if windows is not None:
                print(f"data.{name}: {len(windows):,} sequences in {index_folder(config)}")
        return 0
    # A process that crashes in native code says in which line of Python.
    faulthandler.enable()
    # Before the slow imports: a layout that cannot be is refused at once, a signal is heeded.
    stop = StopRequests()
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    import torch.distributed as dist

    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.lost_ranks import Progress, naming_lost_ranks
    from megatron_ttt.training.run_lock import exclusive_run_dir
    from megatron_ttt.training.trainer import Trainer

    progress = Progress()
    with naming_lost_ranks(progress):
        platform = prepare_process(config)
        # While rank 0 waits for a run before to end, the others wait for rank 0.
        with exclusive_run_dir(Path(config.run.dir), 60 * config.run.timeout_minutes / 2, stop):
            trainer = Trainer(config, platform, stop, hooks=[progress])
            # What stands now lives as long as the run: saves need not collect among it.
            gc.freeze()
            try:
                stopped = trainer.train()
            finally:
                gc.unfreeze()
            dist.barrier()
    dist.destroy_process_group()
    if stopped == LAUNCHER_WAS_KILLED:
        return 1  # which the launchers of other nodes try again
    return EXIT_STOPPED if stopped else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
