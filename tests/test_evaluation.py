"""What an evaluation came to is not lost."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import evaluate

from megatron_ttt import evaluation
from megatron_ttt.errors import UserError


@pytest.fixture
def result(cpu_platform, monkeypatch) -> dict:
    """Of a model that is as wrong as float64 goes, and beyond."""
    batches = [torch.ones(2, 65).long()]
    data = SimpleNamespace(ignored_target_id=None, notes=[], validation_batches=lambda: batches)
    monkeypatch.setattr(evaluation, "open_data", lambda config, train: data)
    evaluator = SimpleNamespace(device="cpu", token_losses=lambda tokens: torch.full((2, 64), 800))
    return evaluation.measure(evaluator, config=None)


def write(result: dict, **files: Path) -> None:
    named = {"hf": None, "checkpoint": "c", "json": None, "plot": None, **files}
    evaluate.write_result(Namespace(**named), result)


def test_a_loss_beyond_all_perplexities_and_a_plot_of_any_name(result, tmp_path, capsys):
    write(result, json=tmp_path / "r.json", plot=tmp_path / "p.txt")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["loss"], printed["perplexity"]) == (800, math.inf)
    assert (tmp_path / "p.txt").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written == {"model": "c", **printed, "loss_by_position": [800] * 64}


@pytest.mark.parametrize("kind", ["json", "plot"])
def test_a_full_disk_is_one_line_after_the_figures(result, kind, capsys):
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        write(result, **{kind: Path("/dev/full")})
    assert json.loads(capsys.readouterr().out)["loss"] == 800
