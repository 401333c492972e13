"""Look for what would stop a run, before it starts.

    python -m megatron_ttt.doctor
    python -m megatron_ttt.doctor --config RECIPE [key.path=value ...]
    python -m megatron_ttt.doctor --nodes HOST HOST ...     # on every one of them at once
    python -m megatron_ttt.doctor --config RECIPE --trial   # ten steps, and a resume of them

This machine's versions, devices and disk are always looked at; with a recipe, its data and
tokenizer. Exit code: 0, or 1 where there is a problem.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_ttt.config import load_config
from megatron_ttt.doctor.findings import Finding
from megatron_ttt.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ttt.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", help="recipe; repeat it to lay overlays")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--trial", action="store_true", help="train ten steps, and resume them")
    parser.add_argument("--processes", type=int, help="of the trial (default: GPUs, or TP x PP)")
    parser.add_argument("--nodes", nargs="+", metavar="HOST", help="all nodes, this one too")
    parser.add_argument("--port", type=int, default=29500, help="of the rendezvous")
    parser.add_argument("--wait", type=float, default=60, help="seconds for the other nodes")
    return parser.parse_intermixed_args()


def main() -> int:
    """Print one line a finding, then how many problems there are."""
    arguments = parse_arguments()
    if (arguments.trial or arguments.overrides) and not arguments.config:
        raise UserError("--config is not given: the trial and overrides need a recipe")
    if not 0 < arguments.port < 2**16:
        raise UserError(f"--port {arguments.port} is no port: choose one of 1 to {2**16 - 1}")
    problems = 0
    for finding in examine(arguments):
        print(finding, flush=True)
        problems += finding.level == "problem"
    print(f"{problems} problem{'' if problems == 1 else 's'} found")
    return 1 if problems else 0


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Every check that was asked for."""
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    # The slow imports, after the arguments were found good.
    from megatron_ttt.doctor.files import check_files
    from megatron_ttt.doctor.machine import check_machine
    from megatron_ttt.doctor.network import check_nodes
    from megatron_ttt.doctor.trial import run_trial

    yield from check_machine(Path(config.run.dir if config else "runs"))
    if arguments.nodes:
        yield from check_nodes(arguments.nodes, arguments.port, arguments.wait)
    if config is not None:
        yield from check_files(config)
    if arguments.trial:
        yield from run_trial(config, arguments.processes)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
