"""What a report knows of a run: its folder's metrics.jsonl and config.yaml."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_ttt.config import flatten_tree
from megatron_ttt.config.former_keys import in_current_keys
from megatron_ttt.errors import UserError

LAST_STEPS = 20
"""Steps at the end of a run whose mean is its final figure."""


@dataclass(frozen=True)
class Run:
    """The records of a run's steps and validations, and its configuration by dotted names."""

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    config: dict[str, Any]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure, where it was recorded."""
        pairs = [(r["step"], r[key]) for r in self.steps + self.validations if key in r]
        return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)

    def last(self, key: str) -> float | None:
        """A figure's mean over the last steps, of its finite numbers: nan without any. None where
        it was not recorded."""
        values = self.curve(key)[1][-LAST_STEPS:]
        finite = values[np.isfinite(values)]
        if len(finite):
            return float(finite.mean())
        return math.nan if len(values) else None

    @property
    def inner_layers(self) -> list[str]:
        """Prefixes of the layers whose inner statistics were recorded, `inner/layer_01`, ..."""
        keys = {key for record in self.steps for key in record if key.endswith("/loss_after")}
        return sorted(key.rpartition("/")[0] for key in keys)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs, named by the shortest ends of their paths that tell them apart.

    Raises UserError where a folder is none of a run's, holds no steps, or is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("a run folder is named twice: name each once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def _read_run(folder: Path, name: str) -> Run:
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    try:
        lines = metrics.read_text().splitlines()
        tree = yaml.safe_load(config.read_text())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; name a run's folder") from None
    except UnicodeDecodeError:
        raise UserError(f"{metrics} is damaged: it is not text") from None
    except yaml.YAMLError:
        raise UserError(f"{config} is damaged: it is not YAML") from None
    records = [_read_record(line, f"{metrics}, line {n}") for n, line in enumerate(lines, 1)]
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(f"{metrics} holds no steps: name a run that has taken one")
    validations = [record for record in records if "val_loss" in record]
    options = flatten_tree(in_current_keys(tree, None)) if isinstance(tree, dict) else {}
    return Run(name, steps, validations, options)


def _read_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{where} is no record of a step: take the line out")


def final_figures(run: Run) -> dict[str, str]:
    """What a run came to, in words; every run has the same rows."""
    last, seconds = run.steps[-1], run.curve("seconds")[1].sum()
    validation = run.curve("val_loss")[1]
    loss, mfu = run.last("loss"), run.last("mfu")
    return {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "loss": f"{loss:.4f}",
        "best validation loss": f"{np.nanmin(validation):.4f}" if len(validation) else "–",
        "tokens a second": f"{np.median(run.curve('tokens_per_second')[1]):,.0f}",
        "MFU": "–" if mfu is None else f"{mfu:.1%}",
        "peak memory": f"{run.curve('memory_gib')[1].max():.2f} GiB",
        "time in steps": f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min",
    }


def differing_options(runs: list[Run]) -> dict[str, list[str]]:
    """The options that are not the same in all runs, and each run's value."""
    names = {name: None for run in runs for name in run.config if name != "run.dir"}
    values = {name: [str(run.config.get(name, "–")) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}
