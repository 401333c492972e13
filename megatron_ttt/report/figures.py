"""The figures of a report: loss, a figure against the step, inner losses by layer.

Each is drawn for a theme, as a matplotlib Figure of its own, without pyplot's global state.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_ttt.report.runs import Run

SMOOTHING = 50
"""A curve is smoothed over one of so many parts of its steps."""


class Theme(NamedTuple):
    """The colours of figures on a page of that lightness."""

    paper: str
    ink: str
    faint: str
    colours: tuple[str, ...]
    """Of runs."""
    depth: tuple[str, str, str]
    """Of layers, from the first over the middle to the last."""


THEMES = {
    "light": Theme(
        *("#ffffff", "#1d2433", "#e3e7ee"),
        ("#2563eb", "#dc5a1f", "#0f9068", "#9333c8", "#b8860b", "#d0287a", "#0e8fa8", "#6b7280"),
        ("#f2a541", "#c2417c", "#2c2a7c"),
    ),
    "dark": Theme(
        *("#161b26", "#e4e8f0", "#2b3342"),
        ("#6ea2ff", "#ff8f5c", "#3fcf9c", "#c58bf2", "#e8bd4a", "#ff7eb6", "#4fd0e6", "#a3acbb"),
        ("#ffd27a", "#ff6f9f", "#7f86ff"),
    ),
}


def png(draw, theme: Theme) -> bytes:
    """What `draw(theme)` draws, as a PNG file."""
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.grid": True,
        "axes.axisbelow": True,
        "figure.facecolor": theme.paper,
        "grid.color": theme.faint,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
    }
    file = io.BytesIO()
    with rc_context(settings):
        draw(theme).savefig(file, dpi=200, metadata={"Software": None})
    return file.getvalue()


def draw_loss(runs: list[Run], theme: Theme) -> Figure:
    """The training loss, smoothed over its own faint trace, and validation losses as dots."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = []
    for run, colour in _coloured(runs, theme):
        steps, losses = run.curve("loss")
        smooth = smoothed(losses)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=_label(run))
        validated, validation = run.curve("val_loss")
        axes.plot(validated, validation, "o", color=colour, markeredgecolor=theme.paper, ms=6)
        shown += [smooth[len(smooth) // 100 :], validation]
    if any(run.validations for run in runs):
        axes.plot([], [], "o", color=theme.ink, ms=5, alpha=0.6, label="validation")
    _finish(axes, "loss")
    # A wild first step does not squeeze the rest.
    finite = np.concatenate(shown)
    if len(finite := finite[np.isfinite(finite)]):
        margin = 0.08 * (np.ptp(finite) or 1.0)
        axes.set_ylim(finite.min() - margin, finite.max() + margin)
    axes.legend()
    return figure


def draw_learning_rate(runs: list[Run], theme: Theme) -> Figure:
    """The outer learning rate."""
    figure, axes = _small()
    for run, colour in _coloured(runs, theme):
        axes.plot(*run.curve("lr"), color=colour, linewidth=1.8, label=_label(run))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
    return _finish_small(figure, axes, runs, "learning rate")


def draw_throughput(runs: list[Run], theme: Theme) -> Figure:
    """Tokens a second, smoothed over their own faint trace."""
    figure, axes = _small()
    for run, colour in _coloured(runs, theme):
        steps, rates = run.curve("tokens_per_second")
        axes.plot(steps, rates, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(rates), color=colour, linewidth=1.8, label=_label(run))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _finish_small(figure, axes, runs, "tokens a second")


def _small() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    return figure, figure.subplots()


def _finish_small(figure: Figure, axes: Axes, runs: list[Run], label: str) -> Figure:
    _finish(axes, label)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(fontsize=8)
    return figure


def draw_inner(run: Run, theme: Theme) -> Figure:
    """Left, each layer's inner loss after its steps, over the run. Right, how far reading took each
    layer at the last look: with the initial state, before and after a mini-batch's step."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = run.inner_layers
    colours = LinearSegmentedColormap.from_list("depth", theme.depth)
    scale = Normalize(1, max(2, len(layers)))
    for number, layer in enumerate(layers, start=1):
        steps, values = run.curve(f"{layer}/loss_after")
        marker = "o" if len(steps) == 1 else None
        left.plot(steps, values, marker=marker, color=colours(scale(number)), linewidth=1.6)
    _finish(left, "inner loss after a mini-batch")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=left, pad=0.01, aspect=40)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.set_label("layer")

    numbers = np.arange(1, len(layers) + 1)
    ends = {
        kind: np.array([run.curve(f"{layer}/loss_{kind}")[1][-1] for layer in layers])
        for kind in ("init", "before", "after")
    }
    right.vlines(numbers, ends["init"], ends["after"], color=theme.faint, linewidth=3, zorder=1)
    for kind, colour, label in (
        ("init", theme.colours[-1], "with the initial state"),
        ("before", theme.colours[0], "before the mini-batch"),
        ("after", theme.colours[1], "after it"),
    ):
        right.plot(numbers, ends[kind], "o", color=colour, ms=5, label=label)
    _finish(right, f"inner loss at step {run.curve(f'{layers[0]}/loss_after')[0][-1]:.0f}")
    right.set_xlabel("layer")
    right.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    right.set_xlim(0.5, len(layers) + 0.5)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean, over the finite values near each, that ends on more than the last value."""
    width = len(values) // SMOOTHING
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    half = np.minimum(width // 2, at)
    first, last = at - half, np.minimum(at + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _label(run: Run) -> str:
    """A run's name for matplotlib, which leaves out of a legend what begins with an underscore, and
    takes what stands between dollars for mathematics."""
    invisible = "\u200b" if run.name.startswith("_") else ""
    return invisible + run.name.replace("$", r"\$")


def _coloured(runs: list[Run], theme: Theme):
    return [(run, theme.colours[i % len(theme.colours)]) for i, run in enumerate(runs)]


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
