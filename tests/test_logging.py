"""Where a run's figures go: by name, every step once, also when the run is taken up again."""

import json
import math
import os
import pty
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import environment, run, start
from small_run import STEPS, small_recipe

from megatron_ttt.training.live import sparkline
from megatron_ttt.training.metrics import MetricsLog, duration
from megatron_ttt.training.monitor import AnomalyWatch
from megatron_ttt.training.saving import Saver

COMMAND = [sys.executable, "pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml"]
FIGURES = {"loss", "lr", "grad_norm", "tokens_per_second", "memory_gib", "data_wait_share"}
INNER = {f"inner/layer_{layer:02d}/loss_after" for layer in (1, 2)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    """Overrides of a small run, in a live view."""
    return [*small_recipe(tmp_path_factory.mktemp("tokens")), "logging.live=true"]


@pytest.fixture(scope="module")
def taken_up_again(recipe, tmp_path_factory) -> tuple[Path, str, str]:
    """A run that got to step 6 and goes on from step 3, with every logger; and what it printed, to
    a file and then to a terminal."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    more = ["logging.tensorboard=true", "logging.wandb_mode=offline"]
    more += ["logging.inner_statistics_every=2", f"run.dir={run_dir}"]
    lines = run([*COMMAND, *recipe, *more, "training.exit_step=6"])
    shutil.rmtree(run_dir / "checkpoint-6")
    return run_dir, lines, run_in_terminal([*COMMAND, *recipe, *more])


def run_in_terminal(command: list[str]) -> str:
    """What a command shows in a terminal."""
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = start(command, theirs, env={**environment(), **terminal})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal
            break
        shown += part
    os.close(ours)
    shown = shown.decode()
    assert process.wait() == 0, shown[-3000:]
    return shown


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_once_in_metrics_jsonl(taken_up_again):
    log = records(taken_up_again[0])
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    for record in log:
        assert set(record) >= FIGURES and 0 <= record["data_wait_share"] <= 1
        assert (set(record) >= INNER) == (record["step"] % 2 == 0)
    assert all(math.isfinite(log[1][name]) for name in INNER)


def test_looking_at_the_inner_loop_changes_nothing(recipe, taken_up_again, tmp_path):
    run([*COMMAND, *recipe, f"run.dir={tmp_path}"])
    losses = [(record["loss"], record["grad_norm"]) for record in records(tmp_path)]
    assert losses == [(r["loss"], r["grad_norm"]) for r in records(taken_up_again[0])]


def test_saves_do_not_count_in_the_rate(build_trainer, recipe, tmp_path, monkeypatch):
    clock, saved = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1e6 * len(saved))
    monkeypatch.setattr(
        Saver, "save", lambda saver, chunks, optimizer, state, **rest: saved.append(state["step"])
    )
    overrides = [f"run.dir={tmp_path}", "logging.live=false", "training.log_every=100"]
    build_trainer(*recipe, *overrides).train()
    assert saved == [3, 6, 8]
    assert all(record["tokens_per_second"] > 1 for record in records(tmp_path))


def test_the_time_left_counts_validations_and_saves(
    build_trainer, recipe, tmp_path, monkeypatch, capsys
):
    now = [0.0]
    overrides = [f"run.dir={tmp_path}", "training.steps=100", "training.log_every=1"]
    trainer = build_trainer(*recipe, *overrides, "logging.live=false")
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = MetricsLog(trainer.config, trainer.platform)
    log.on_train_start(trainer)
    for trainer.step in (1, 2, 3, 4):
        now[0] += 60 if trainer.step == 1 else 2  # the first compiles
        log.on_step_end(trainer, {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0}, [])
        if trainer.step == 2:
            now[0] += 30
            log.on_validation_end(trainer, 1.0)
    log.on_train_end(trainer, None)
    # Of 99, 98, 97 and 96 steps; with the validation three took 36 seconds.
    left = [60 * 99, 2 * 98, 34 / 2 * 97, 36 / 3 * 96]
    assert re.findall(r"eta=(\S+)", capsys.readouterr().out) == [*map(duration, left)]


def test_every_step_once_in_tensorboard(taken_up_again):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = taken_up_again[0]
    assert len(list((run_dir / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    log = records(run_dir)
    assert set(events.Tags()["scalars"]) == {key for record in log for key in record} - {"step"}
    for name in FIGURES | INNER:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(record["step"], record[name]) for record in log if name in record]
        assert [step for step, _ in shown] == [step for step, _ in wanted], name
        assert np.allclose([v for _, v in shown], [v for _, v in wanted], rtol=1e-6), name


def wandb_records(path: Path) -> Iterator:
    """The records of an offline run: a log in LevelDB's format, behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data = path.read_bytes(), 7, b""
    block, head = 32768, struct.Struct("<IHB")
    while at + head.size <= len(content):
        if block - at % block < head.size:  # no room for a head: the block ends
            at += block - at % block
            continue
        _, length, kind = head.unpack_from(content, at)
        at += head.size
        data += content[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(data)
            data = b""


def test_weights_and_biases_has_the_figures_by_name(taken_up_again):
    run_dir = taken_up_again[0]
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    seen, run_ids = {}, set()
    for record in (record for path in files for record in wandb_records(path)):
        if record.HasField("run"):
            run_ids.add(record.run.run_id)
        if record.HasField("history"):
            items = record.history.item
            figures = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
            }
            seen[figures["_step"]] = figures
    assert run_ids == {(run_dir / "wandb_id").read_text()}
    assert sorted(seen) == list(range(1, STEPS + 1))
    for record in records(run_dir):
        wanted = {key: value for key, value in record.items() if key != "step"}
        assert wanted.items() <= seen[record["step"]].items()


def test_the_live_view_is_for_terminals(taken_up_again):
    _, lines, shown = taken_up_again
    assert "Step 6: loss=" in lines and "╭" not in lines
    assert "Step 8: loss=" not in shown
    # Its last picture, without the control codes.
    panel = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).rpartition("╭")[2]
    last = records(taken_up_again[0])[-1]
    assert "step 8 of 8" in panel and "0:00:00 left" in panel
    for figure in (f"{last['loss']:.4f}", f"{last['grad_norm']:.3f}", "tokens/s", "data wait"):
        assert figure in panel, panel
    assert re.search("loss of the last steps +[▁▂▃▄▅▆▇█]{5}", panel)
    # Other lines come above it.
    assert re.search(r"Saved \S+checkpoint-8", shown)


def test_a_missing_package_is_said_before_anything_is_built(recipe, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['tensorboard'] = None\n")
    path = f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = ["env", f"PYTHONPATH={path}", *COMMAND, *recipe, f"run.dir={tmp_path}/run"]
    output = run([*command, "logging.tensorboard=true"], expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "megatron-ttt[tensorboard]" in line and "Traceback" not in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_an_account_that_is_missing_is_said(recipe, tmp_path):
    command = ["env", "-u", "WANDB_API_KEY", f"HOME={tmp_path}", *COMMAND, *recipe]
    output = run([*command, f"run.dir={tmp_path}/run", "logging.wandb_mode=online"], expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "logging.wandb_mode=online: " in line and "wandb login" in line
    assert "Traceback" not in output


def test_event_files_end_where_there_is_no_room(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from megatron_ttt.training.loggers import TensorBoard
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
board = TensorBoard(Path(sys.argv[1]), 0)
for step in range(1, 400):
    board.write({"step": step, "loss": 1.0})
    if step % 100 == 0:
        board.flush()
board.close(failed=False)
print("went on")
"""
    output = run([sys.executable, "-c", script, tmp_path])
    assert output.count("Warning: tensorboard/ cannot be written: File too large") == 1
    assert "went on" in output


def test_sparkline():
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 7.0, math.nan, 3.5]) == "▁█ ▅"


def test_a_report_of_the_inner_loop_where_something_is_wrong(
    build_trainer, recipe, tmp_path, capsys
):
    trainer = build_trainer(*recipe, f"run.dir={tmp_path}", "training.max_bad_steps=100")
    microbatches = next(trainer.data.train_batches(0, STEPS))
    figures = trainer.train_step(microbatches)
    watch = AnomalyWatch()
    watch.on_step_end(trainer, figures, microbatches)
    assert capsys.readouterr().out == ""
    mixer = trainer.chunks[0].decoder.layers[1].self_attention
    mixer.W1.data[0, 0, 0] = math.nan
    mixer.learnable_token_idx.data[2:6] = -1
    trainer.step, trainer.bad_steps_in_a_row = 2, 1
    watch.on_step_end(trainer, figures, microbatches)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "The inner loop at step 2:" and len(table) == 4
    assert table[2].endswith("100.0%") and " 0% " in table[2]
    assert "nan" in table[3] and " 25% " in table[3] and not table[3].endswith("100.0%")
    # Not again at once.
    trainer.step, trainer.bad_steps_in_a_row = 3, 2
    watch.on_step_end(trainer, figures, microbatches)
    assert capsys.readouterr().out == ""
