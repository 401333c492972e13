#!/usr/bin/env python3
"""Plot runs, one or several to compare: PNG files and one HTML page that holds everything.

    tools/plot_run.py runs/NAME [runs/OTHER ...] [--output FOLDER]

Loss, learning rate, throughput, and the inner losses of every layer where
`logging.inner_statistics_every` recorded them; the final figures, and the options that differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ttt.errors import run_command


def main() -> None:
    """Read the arguments, the runs, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="a run's folder (run.dir)")
    parser.add_argument(
        "--output", type=Path, help="folder to write to (default: report/ in the first run's)"
    )
    arguments = parser.parse_args()

    from megatron_ttt.report.page import write_report
    from megatron_ttt.report.runs import read_runs

    runs = read_runs(arguments.run_dir)
    for path in write_report(runs, arguments.output or arguments.run_dir[0] / "report"):
        print(path)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
