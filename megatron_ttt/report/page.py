"""The report as one HTML page that needs nothing beside it, for light and dark screens."""

from __future__ import annotations

import base64
import html
from functools import partial
from pathlib import Path
from string import Template

from megatron_ttt.errors import make_folder
from megatron_ttt.report.figures import (
    THEMES,
    draw_inner,
    draw_learning_rate,
    draw_loss,
    draw_throughput,
    png,
)
from megatron_ttt.report.runs import Run, differing_options, final_figures

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #f4f6fa; --paper: #ffffff; --ink: #1d2433; --quiet: #667085; --line: #e3e7ee;
        --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0e121a; --paper: #161b26; --ink: #e4e8f0; --quiet: #97a1b3; --line: #2b3342;
          --accent: #6ea2ff; } }
* { box-sizing: border-box; margin: 0 }
body { background: var(--page); color: var(--ink); padding: 3rem 1.25rem 4rem;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1040px; margin: auto; display: grid; gap: 1.25rem;
       grid-template-columns: repeat(2, minmax(0, 1fr)) }
header, .wide { grid-column: 1 / -1 }
header p { color: var(--quiet) }
h1 { font-size: 1.75rem; font-weight: 650; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { font-size: .95rem; font-weight: 600; margin-bottom: .75rem }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
          padding: 1.1rem 1.25rem }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line);
         white-space: nowrap }
tr:last-child td { border-bottom: 0 }
th { color: var(--quiet); font-weight: 500; font-size: .82rem }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child { font-weight: 600 }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-weight: 500 }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)) }
.cards section { padding: .8rem 1rem }
.cards b { display: block; font-size: 1.25rem; font-weight: 650; letter-spacing: -.02em }
.cards span, .none { color: var(--quiet); font-size: .85rem }
@media (max-width: 720px) { main { grid-template-columns: minmax(0, 1fr) } }
</style>
</head>
<body>
<main>
<header><p>$subtitle</p><h1>$title</h1></header>
$body
</main>
</body>
</html>
""")


def write_report(runs: list[Run], folder: Path) -> list[Path]:
    """Write loss.png, lr.png, throughput.png, inner*.png and report.html; return their paths."""
    figures = {
        "loss": ("Loss", partial(draw_loss, runs)),
        "lr": ("Learning rate", partial(draw_learning_rate, runs)),
        "throughput": ("Throughput", partial(draw_throughput, runs)),
    }
    for number, run in enumerate(runs, start=1):
        if run.inner_layers:
            name = "inner" if len(runs) == 1 else f"inner_{number}"
            figures[name] = f"Inner loop by layer · {run.name}", partial(draw_inner, run)
    images = {
        name: {kind: png(draw, theme) for kind, theme in THEMES.items()}
        for name, (_, draw) in figures.items()
    }
    finals = {run.name: final_figures(run) for run in runs}
    sections = [_finals(finals)]
    for name, (title, _) in figures.items():
        sections.append(_figure(title, images[name], wide=name not in ("lr", "throughput")))
    if len(runs) > 1:
        sections.append(_differences(runs))
    models = {" ".join(run.config.get("model.pattern", ["unknown model"])) for run in runs}
    page = PAGE.substitute(
        title=html.escape(" · ".join(finals)),
        subtitle=html.escape(
            f"{len(runs)} run{'s' * (len(runs) > 1)} of {', '.join(sorted(models))}"
        ),
        body="\n".join(sections),
    )
    make_folder(folder)
    files = {f"{name}.png": image["light"] for name, image in images.items()}
    files["report.html"] = page.encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _figure(title: str, image: dict[str, bytes], *, wide: bool) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(image[kind]).decode()}"
        for kind in ("light", "dark")
    )
    title = html.escape(title)
    return (
        f"<section{' class=wide' * wide}><h2>{title}</h2><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{title}" src="{light}"></picture></section>'
    )


def _finals(finals: dict[str, dict[str, str]]) -> str:
    """What each run came to: cards for one, a table for several."""
    (figures, *others) = finals.values()
    if not others:
        cards = "".join(
            f"<section><b>{figure}</b><span>{name}</span></section>"
            for name, figure in figures.items()
            if figure != "–"
        )
        return f'<div class="wide cards">{cards}</div>'
    known = [name for name in figures if any(run[name] != "–" for run in finals.values())]
    rows = [[html.escape(run), *(finals[run][name] for name in known)] for run in finals]
    return _section("Final figures", _table(["run", *known], rows))


def _differences(runs: list[Run]) -> str:
    rows = [
        [f"<code>{html.escape(name)}</code>", *map(html.escape, values)]
        for name, values in differing_options(runs).items()
    ]
    if not rows:
        return _section("Options that differ", '<p class="none">None but the folder.</p>')
    names = [html.escape(run.name) for run in runs]
    return _section("Options that differ", _table(["option", *names], rows))


def _section(title: str, content: str) -> str:
    return f'<section class="wide"><h2>{title}</h2>{content}</section>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
