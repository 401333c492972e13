"""The commands from outside: a run on real files, what it leaves, what it refuses."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, environment, finish, run, torchrun

from megatron_ttt.data.indexed import IndexedWriter
from megatron_ttt.data.tokenizer_training import train_tokenizer

VOCABULARY = 350
PRETRAIN = [sys.executable, "pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml"]
SMALL = [
    "training.steps=6",
    "training.seq_length=32",
    "training.eval_batches=1",
    "model.vocab_size=352",
    "checkpoint.export_final=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """tokenizer.model, train and validation .bin/.idx."""
    folder = tmp_path_factory.mktemp("data")
    text = (ROOT / "LICENSE").read_text().split("\n\n")
    lines = [json.dumps({"text": paragraph, "url": "", "timestamp": ""}) for paragraph in text]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([str(folder / "text.jsonl")], str(folder / "tokenizer"), VOCABULARY)
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 8)):
        writer = IndexedWriter(folder / f"{split}_text_document", np.dtype("<u2"))
        for _ in range(count):
            ids = random.integers(1, VOCABULARY, random.integers(20, 200)).astype("<u2")
            writer.append(ids.tobytes(), np.array([len(ids)], np.int32))
        writer.publish()
    return folder


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.train={data}/train_text_document",
        f"data.validation={data}/validation_text_document",
        f"data.tokenizer_model={data}/tokenizer.model",
        f"run.dir={run_dir}",
        *more,
    ]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_timing(record: dict) -> dict:
    keys = ("step", "loss", "lr", "grad_norm", "val_loss", "tokens")
    return {key: record[key] for key in keys if key in record}


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory) -> Path:
    """Six steps in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    overrides = options(
        data,
        run_dir,
        "checkpoint.save_every=2",
        "checkpoint.milestone_every=4",
        "checkpoint.keep=2",
        "training.eval_every=3",
        "logging.wandb_mode=offline",
    )
    output = run([*PRETRAIN, *overrides])
    assert "Step 1: loss=" in output
    return run_dir


def test_a_run_leaves_what_it_should(whole_run):
    log = records(whole_run)
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in log if "val_loss" in r] == [3, 6]
    folders = {path.name for path in whole_run.iterdir() if path.is_dir()}
    assert folders == {"checkpoint-4", "checkpoint-6", "milestone-4", "cache", "wandb"}
    assert list((whole_run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (whole_run / "config.yaml").exists()
    state = json.loads((whole_run / "milestone-4" / "state.json").read_text())
    assert state["step"] == 4


def test_a_run_stopped_twice_gives_the_same_figures(data, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    for stop in ("training.exit_step=1", "training.exit_step=4", ""):
        overrides = options(data, run_dir, "training.eval_every=3", "checkpoint.save_every=3")
        run([*PRETRAIN, *overrides, *([stop] if stop else [])])
    whole = [without_timing(r) for r in records(whole_run)]
    stopped = [without_timing(r) for r in records(run_dir)]
    # A validation is also run where a part ends.
    assert [r for r in stopped if "loss" in r] == [r for r in whole if "loss" in r]
    assert stopped[-1] == whole[-1]


def test_a_run_under_torchrun_is_the_same_run(data, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    overrides = options(data, run_dir, "training.eval_every=3")
    config = "--config", "yaml_recipes/debug_cpu.yaml"
    torchrun(2, ROOT / "pretrain_ttt.py", *config, *overrides)
    for one, two in zip(records(whole_run), records(run_dir)):
        assert one["step"] == two["step"]
        for key in ("loss", "val_loss"):
            assert one.get(key) == pytest.approx(two.get(key), abs=1e-5)


def test_evaluation_repeats_the_validation_loss(whole_run):
    command = [sys.executable, "tools/evaluate.py", "--checkpoint", whole_run / "checkpoint-6"]
    loss = json.loads(run(command).splitlines()[-1])["loss"]
    assert loss == pytest.approx(records(whole_run)[-1]["val_loss"], abs=1e-6)
    no_inner = json.loads(run([*command, "mixers.ttt_linear.base_lr=0"]).splitlines()[-1])["loss"]
    assert no_inner != loss


def refusal(command, **options) -> str:
    """The one line, all there is on stderr, with which a command refuses."""
    user = {key: value for key, value in environment().items() if key != "PYTHONWARNINGS"}
    done = finish(command, env=user, **options)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_refuses_what_cannot_be_trained(data, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    truncated = tmp_path / "truncated"
    shutil.copy(data / "train_text_document.idx", f"{truncated}.idx")
    whole = (data / "train_text_document.bin").read_bytes()
    Path(f"{truncated}.bin").write_bytes(whole[:-10])
    cases = {
        "model.depth=3": "model.depth",
        "training.micro_batch_size=lots": "micro_batch_size",
        "parallel.tensor_model_parallel_size=3": "num_heads=4",
        "training.global_batch_size=7": "global_batch_size",
        f"data.train={tmp_path}/nowhere": "nowhere",
        f"data.train={truncated}": "truncated",
        "model.vocab_size=340": "tokenizer",
        f"checkpoint.load={tmp_path}/nothing": "nothing",
        "--gpu=H100": "--gpu plan a run and train none",
        "training.scan_backend=triton": "they need a CUDA device, not cpu",
    }
    for override, named in cases.items():
        line = refusal([*PRETRAIN, *options(data, run_dir), override])
        assert named in line, (override, line)
        assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_rank_that_is_alone_with_a_mistake_says_so():
    command = """
from megatron_ttt import errors

def main():
    raise errors.UserError("no")

errors.RANK_0_FIRST_SECONDS = 0.1
raise SystemExit(errors.run_command(main))
"""
    for rank, said in (("0", "error: no"), ("3", "error (rank 3): no")):
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={**environment(), "RANK": rank},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr.strip()) == (2, said)


def test_refuses_a_checkpoint_of_another_architecture(data, whole_run, tmp_path):
    load = f"checkpoint.load={whole_run}/checkpoint-6"
    overrides = options(data, tmp_path / "run", load, "model.hidden_size=128")
    line = refusal([*PRETRAIN, *overrides])
    assert "hidden_size=64 there, 128 here" in line


def test_refuses_to_start_over_a_run(data, whole_run):
    # In a process of its own: imports must say nothing either.
    line = refusal([*PRETRAIN, *options(data, whole_run, "checkpoint.load=none")], forked=False)
    assert "checkpoint-6" in line
    assert (whole_run / "checkpoint-6" / "state.json").exists()


def test_exports_that_are_missing_are_made_up_for(data, tmp_path):
    """As after a run that was killed while it exported."""
    run_dir = tmp_path / "run"
    command = [*PRETRAIN, *options(data, run_dir, "checkpoint.milestone_every=3")]
    run(command)
    assert not (run_dir / "final_model").exists()
    half = run_dir / ".exported-milestone-3-hf.0123abcd"
    half.mkdir()
    more = ["checkpoint.export_final=true", "checkpoint.export_milestones=true"]
    output = run([*command, *more])
    assert "Nothing to do: step 6 of 6" in output and not half.exists()
    for name in ("final_model", "milestone-3-hf", "milestone-6-hf"):
        assert f"Exported {run_dir / name}" in output
        assert (run_dir / name / "model.safetensors").exists()
    assert "Exported" not in run([*command, *more])
    # One of another checkpoint, as after training.steps was raised and the run killed at its end.
    shutil.rmtree(run_dir / "final_model")
    shutil.copytree(run_dir / "milestone-3-hf", run_dir / "final_model")
    assert run([*command, *more]).count("Exported") == 1
    weights = [run_dir / name / "model.safetensors" for name in ("final_model", "milestone-6-hf")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_export_has_its_name_as_soon_as_it_is_done(whole_run, tmp_path):
    from megatron_ttt.hf.background import BackgroundExports

    exports, lines = BackgroundExports(), []
    for name, checkpoint in (("a", "checkpoint-6"), ("b", "checkpoint-7"), ("c", "checkpoint-6")):
        exports.add(whole_run / checkpoint, tmp_path / name)
    while exports.busy:
        lines += exports.advance()
        assert len(lines) != 1 or ((tmp_path / "a").exists() and not (tmp_path / "c").exists())
        time.sleep(0.05)
    assert lines[0] == f"Exported {tmp_path}/a" and lines[2] == f"Exported {tmp_path}/c"
    assert lines[1].startswith(f"NOT exported: {tmp_path}/b: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export-b.log", "a", "c"]
    exports.add(whole_run / "checkpoint-6", tmp_path / "d")
    exports.add(whole_run / "checkpoint-6", tmp_path / "e")
    exports.advance()
    exports.abandon()
    while exports.busy:
        time.sleep(0.05)
        lines += exports.advance()
    assert len(lines) == 4 and lines[3].startswith(f"NOT exported: {tmp_path}/d: ")
