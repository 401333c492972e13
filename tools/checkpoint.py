#!/usr/bin/env python3
"""Look after the checkpoints of a run.

tools/checkpoint.py list RUN_DIR          a line each
tools/checkpoint.py inspect CHECKPOINT    architecture, step, layout, losses, tensors, sizes
tools/checkpoint.py verify PATH [...]     checkpoints, or run folders: every checksum
tools/checkpoint.py prune RUN_DIR --keep N
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ttt.errors import UserError, run_command


def main() -> int:
    """Read the arguments and do what the verb says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list").add_argument("run_dir", type=Path)
    verbs.add_parser("inspect").add_argument("checkpoint", type=Path)
    verbs.add_parser("verify").add_argument("path", type=Path, nargs="+")
    pruning = verbs.add_parser("prune")
    pruning.add_argument("run_dir", type=Path)
    pruning.add_argument("--keep", type=int, required=True, help="newest checkpoints to keep")
    arguments = parser.parse_args()

    from megatron_ttt.checkpoint import inspection

    if arguments.verb == "list":
        print(inspection.listing(arguments.run_dir))
    elif arguments.verb == "inspect":
        print(inspection.description(arguments.checkpoint))
    elif arguments.verb == "verify":
        damages = inspection.verify(arguments.path)
        for path, damage in damages.items():
            print(f"{path}: {damage or 'good'}")
        print("Checksums show that files are as they were written, not who wrote them.")
        if any(damages.values()):
            raise UserError("damaged checkpoints: delete them, a run skips them anyway")
    elif arguments.keep < 1:
        raise UserError(f"--keep is {arguments.keep}: keep at least 1")
    else:
        for path in inspection.prune_run(arguments.run_dir, arguments.keep):
            print(f"Removed {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
