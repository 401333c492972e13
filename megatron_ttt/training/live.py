"""A run as a live view in the terminal, in place of log lines (`logging.live`)."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_ttt.config import Config
from megatron_ttt.stack import architecture_of

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 60
"""Steps of the loss that are drawn."""
REFRESH_SECONDS = 0.1


class LiveView:
    """Progress, figures and the loss of the last steps; other lines scroll past above it.

    Drawn when a step ends: no thread of its own, as checkpoints are written by forks.
    """

    def __init__(self, title: str, first_step: int, last_step: int, console: Console):
        self.title, self.step_number, self.last_step = title, first_step, last_step
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.record: dict[str, Any] = {}
        self.seconds_left, self.drawn = "", 0.0
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render)
        self.live.start()

    @classmethod
    def open(cls, config: Config, first_step: int) -> LiveView | None:
        """The view of a run; None where stdout is no terminal, so that log lines remain."""
        console = Console()
        if not console.is_terminal:
            return None
        last = config.training.exit_step or config.training.steps
        return cls(
            f"{Path(config.run.dir).name} · {architecture_of(config).label}",
            first_step,
            last,
            console,
        )

    def step(self, record: dict[str, Any], seconds_left: str) -> None:
        """Show a step's record."""
        self.step_number, self.record, self.seconds_left = record["step"], record, seconds_left
        self.losses.append(record["loss"])
        now = time.monotonic()
        if now - self.drawn >= REFRESH_SECONDS or self.step_number == self.last_step:
            self.live.refresh()
            self.drawn = now

    def close(self) -> None:
        """Leave the last picture standing."""
        self.live.stop()

    def render(self) -> Panel:
        """The picture."""
        progress = Table.grid(expand=True, padding=(0, 1))
        progress.add_column(ratio=1)
        progress.add_column(justify="right")
        progress.add_row(
            ProgressBar(self.last_step, self.step_number),
            f"step [bold]{self.step_number:,}[/] of {self.last_step:,}  "
            f"[dim]{self.seconds_left} left[/]",
        )
        figures = Table.grid(expand=True, padding=(0, 1))
        shown = self._figures()
        for _ in shown:
            figures.add_column(ratio=1)
        figures.add_row(*(f"[dim]{name}[/]" for name in shown))
        figures.add_row(*(f"[bold]{figure}[/]" for figure in shown.values()))
        loss = Text.assemble(("loss of the last steps  ", "dim"), (sparkline(self.losses), "cyan"))
        return Panel(Group(progress, "", figures, "", loss), title=self.title, border_style="dim")

    def _figures(self) -> dict[str, str]:
        record = self.record
        if not record:
            return {"loss": "…"}
        shown = {
            "loss": f"{record['loss']:.4f}",
            "lr": f"{record['lr']:.2e}",
            "grad norm": f"{record['grad_norm']:.3f}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
            "data wait": f"{record['data_wait_share']:.1%}",
            "memory": f"{record['memory_gib']:.2f} GiB",
        }
        if "mfu" in record:
            shown["MFU"] = f"{record['mfu']:.1%}"
        if "skipped_steps" in record:
            shown["skipped"] = f"[red]{record['skipped_steps']}[/]"
        return shown


def sparkline(values) -> str:
    """A bar a value, between the least and the greatest; a gap where one is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(
        BARS[round((value - low) / span * (len(BARS) - 1))] if math.isfinite(value) else " "
        for value in values
    )
