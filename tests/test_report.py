"""Reports of real runs."""

import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, run
from matplotlib.image import imread

from megatron_ttt.report.figures import THEMES, draw_loss, png, smoothed
from megatron_ttt.report.runs import LAST_STEPS, Run

TOOL = [sys.executable, "tools/plot_run.py"]
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A run that looked at its inner loop, and the same under another name and learning rate,
    without."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(2, 96, (STEPS, 4, 33)))
    run(
        [
            *(sys.executable, "pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml"),
            *(f"data.fixed_batches={tokens}", "data.train=[]", "data.validation=[]"),
            *("data.tokenizer_model=null", "training.seq_length=32", "model.vocab_size=96"),
            *("training.global_batch_size=4", "model.hidden_size=32", "model.ffn_hidden_size=64"),
            *(f"training.steps={STEPS}", "logging.inner_statistics_every=2", "checkpoint.keep=1"),
            f"run.dir={folder}/a&b",
        ]
    )
    other = folder / "other"
    other.mkdir()
    config = (folder / "a&b/config.yaml").read_text().replace("lr: 0.003", "lr: 0.001")
    (other / "config.yaml").write_text(config)
    for line in (folder / "a&b/metrics.jsonl").read_text().splitlines():
        record = {k: v for k, v in json.loads(line).items() if not k.startswith("inner/")}
        # A validation, and a loss that is not a number.
        record["loss"] = float("nan") if record["step"] == 3 else record["loss"] + 1
        validated = {"step": record["step"], "val_loss": 4.25}
        with open(other / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n" + json.dumps(validated) + "\n")
    return [folder / "a&b", other]


def report(tmp_path: Path, *folders: Path) -> tuple[set[str], str]:
    """The files written, each PNG a picture of some size, and the page."""
    output = run([*TOOL, *folders, "--output", tmp_path / "report"])
    files = [Path(line) for line in output.splitlines() if line.startswith(str(tmp_path))]
    for path in files:
        if path.suffix == ".png":
            picture = imread(path)
            assert min(picture.shape[:2]) > 400 and picture.std() > 0.01
    return {path.name for path in files}, (tmp_path / "report/report.html").read_text()


def without_images(page: str) -> str:
    """The page's text; nothing in it may be fetched from elsewhere."""
    page, images = re.subn(r'"data:image/png;base64,[A-Za-z0-9+/=]+"', '""', page)
    assert images == 2 * page.count("<picture>") > 0
    assert "http" not in page and "url(" not in page and "<script" not in page
    return page


def test_one_run(runs, tmp_path):
    files, page = report(tmp_path, runs[0])
    assert files == {"loss.png", "lr.png", "throughput.png", "inner.png", "report.html"}
    page = without_images(page)
    losses = [json.loads(line)["loss"] for line in (runs[0] / "metrics.jsonl").open()]
    for figure, name in ((f"{np.mean(losses):.4f}", "loss"), (f"{STEPS * 128}", "tokens")):
        assert f"<b>{figure}</b><span>{name}</span>" in page
    assert "<h1>a&amp;b</h1>" in page and "Options that differ" not in page


def test_runs_compared(runs, tmp_path):
    files, page = report(tmp_path, *runs)
    assert files == {"loss.png", "lr.png", "throughput.png", "inner_1.png", "report.html"}
    page = without_images(page)
    assert "<td><code>optimizer.lr</code></td><td>0.003</td><td>0.001</td>" in page
    assert page.count("<code>") == 1  # run.dir is no option that differs
    losses = [json.loads(line).get("loss", np.nan) for line in (runs[1] / "metrics.jsonl").open()]
    assert f"<td>other</td><td>6</td><td>768</td><td>{np.nanmean(losses):.4f}</td>" in page
    assert "<td>4.2500</td>" in page


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "x/run")
    shutil.copytree(runs[1], tmp_path / "y/run")
    _, page = report(tmp_path, tmp_path / "x/run", tmp_path / "y/run")
    page = without_images(page)
    assert "<h1>x/run · y/run</h1>" in page and "None but the folder." in page


def test_a_mistake_is_one_line(runs, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(runs[1], bad)

    def error(*folders) -> str:
        command = [*TOOL, *folders, "--output", tmp_path / "report"]
        (line,) = run(command, expect=2).splitlines()
        assert not (tmp_path / "report").exists()
        return line

    assert "No such file" in error(tmp_path / "nowhere")
    assert "is named twice" in error(bad, ROOT / bad)
    (bad / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert "metrics.jsonl, line 2 is no record of a step" in error(bad)
    (bad / "metrics.jsonl").write_text("")
    assert "holds no steps" in error(bad)
    (bad / "config.yaml").write_text("a: [")
    assert "config.yaml is damaged" in error(bad)


def made_up(name: str, losses: list[float], validation: float = 3.0) -> Run:
    steps = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    return Run(name, steps, [{"step": len(steps), "val_loss": validation}], {})


def test_the_last_steps_are_the_last_also_where_they_are_no_numbers():
    assert made_up("a", [5.0, math.nan, 4.0]).last("loss") == 4.5
    assert math.isnan(made_up("a", [5.0] + [math.nan] * LAST_STEPS).last("loss"))
    assert made_up("a", [5.0]).last("mfu") is None


def test_a_validation_loss_is_in_the_picture():
    runs = [made_up("a", [4.0] * 50, validation=6.0), made_up("b", [4.0] * 50, math.nan)]
    (axes,) = draw_loss(runs, THEMES["light"]).axes
    low, high = axes.get_ylim()
    assert low < 4.0 and 6.0 < high < 7.0


@pytest.mark.parametrize("name", ["_ft", "a$b", "lr$_{$", r"\$x$"])
def test_a_run_has_its_name_in_the_legend(name):
    legends = []

    def draw(theme):
        figure = draw_loss([made_up(name, [4.0, 3.0])], theme)
        legends.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return figure

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(draw, THEMES["light"])
    shown, validation = (text.replace(r"\$", "$") for text in legends)
    assert (shown.lstrip("\u200b"), validation) == (name, "validation")


def test_smoothing_is_a_mean_of_what_is_finite():
    values = np.arange(200.0)
    assert np.allclose(smoothed(values)[:198], values[:198])  # the middle of a straight line
    values[100] = np.nan
    assert abs(smoothed(values)[100] - 100) < 1
