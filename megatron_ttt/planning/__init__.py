"""What a configuration will cost, from arithmetic alone (docs/planning.md).

`cost.py` counts parameters, FLOPs and checkpoint bytes; `memory.py` what a rank holds at its
fullest moment; `communication.py` what it sends; `layouts.py` which layouts there are, and which
are fast; `report.py` is `--dry-run`.
"""

from megatron_ttt.planning.cost import (
    count_parameters,
    forward_flops_per_token,
    peak_flops,
    training_flops_per_token,
)
from megatron_ttt.planning.memory import memory_per_rank
from megatron_ttt.planning.report import describe, dry_run

__all__ = [
    "count_parameters",
    "describe",
    "dry_run",
    "forward_flops_per_token",
    "memory_per_rank",
    "peak_flops",
    "training_flops_per_token",
]
