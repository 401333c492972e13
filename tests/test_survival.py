"""Runs that are stopped, killed, damaged or go wrong, and what is left of them."""

import gc
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, run, torchrun
from small_run import (
    COMMAND,
    STEPS,
    begin,
    begin_torchrun,
    losses,
    small_recipe,
    steps,
    wait_for,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
from kill_test import digests

from megatron_ttt.checkpoint.manifest import find_damage
from megatron_ttt.checkpoint.run_folder import (
    check_architecture,
    find_newest,
    link_milestone,
    list_checkpoints,
    prune,
)
from megatron_ttt.config import config_with_defaults
from megatron_ttt.errors import UserError
from megatron_ttt.stack import architecture_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return small_recipe(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to: checkpoints 3, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run([sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}"])
    return run_dir


def test_a_checkpoint_is_what_its_manifest_says(whole):
    assert steps(whole) == [3, 6, 8]
    assert (whole / "latest").read_text() == "checkpoint-8\n"
    for listed in list_checkpoints(whole):
        assert find_damage(listed.path) is None
    assert not list(whole.glob(".*"))


def test_any_flipped_byte_is_found_and_the_checkpoint_before_is_taken(whole, tmp_path):
    random = np.random.default_rng(1)
    names = sorted(path.name for path in (whole / "checkpoint-8").iterdir())
    kinds = {"manifest.json", "state.json", "metadata.json", ".metadata"}
    assert kinds < set(names) and any(name.endswith(".distcp") for name in names)
    shutil.copytree(whole, tmp_path / "run")
    for name in names:
        path = tmp_path / "run/checkpoint-8" / name
        content = path.read_bytes()
        for position in (0, int(random.integers(len(content))), len(content) - 1):
            flipped = bytearray(content)
            flipped[position] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            said = []
            listed = list_checkpoints(tmp_path / "run")
            assert find_newest(listed, said.append).step == 6, (name, position)
            assert len(said) == 1 and "checkpoint-8: " in said[0]
        path.write_bytes(content)
    assert find_newest(list_checkpoints(tmp_path / "run")).step == 8
    (tmp_path / "run/checkpoint-8" / names[-1]).unlink()
    (tmp_path / "run/checkpoint-6/more").write_text("")
    assert find_newest(list_checkpoints(tmp_path / "run")).step == 3
    (tmp_path / "run/checkpoint-3/manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint in"):
        find_newest(list_checkpoints(tmp_path / "run"))


def test_a_run_goes_on_from_the_newest_that_is_good(recipe, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoint-8")
    state = run_dir / "checkpoint-6/state.json"
    state.write_text(state.read_text() + " ")
    (run_dir / ".incomplete-checkpoint-7").mkdir()
    shutil.copytree(run_dir / "checkpoint-3", run_dir / ".removed-checkpoint-1")
    output = run([sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}"])
    assert "Skipped" in output and "checkpoint-6: state.json has" in output
    assert "checkpoint-3 at step 3" in output
    assert losses(run_dir) == losses(whole)
    assert steps(run_dir) == [3, 6, 8] and not list(run_dir.glob(".*"))


def test_a_run_goes_back_once_and_then_goes_on(recipe, whole, tmp_path):
    """What was after the step it goes back to is neither gone on from nor counted as newest."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.copytree(whole / "checkpoint-6", run_dir / "milestone-6")
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}", "checkpoint.keep=2"]
    command += [f"checkpoint.load={run_dir}/checkpoint-3"]
    output = run([*command, "training.exit_step=4"])
    aside = [f"abandoned-{name}" for name in ("checkpoint-6", "milestone-6", "checkpoint-8")]
    assert f"not wanted: {', '.join(aside)}" in output
    assert all((run_dir / name / "manifest.json").exists() for name in aside)
    assert steps(run_dir) == [3, 4]
    assert (run_dir / "latest").read_text() == "checkpoint-4\n"
    assert f"Resumed from {run_dir}/checkpoint-4" in run([*command, "checkpoint.milestone_every=6"])
    assert losses(run_dir) == losses(whole)
    assert steps(run_dir) == [6, 6, 8]


def test_a_checkpoint_of_another_function_is_warned_of(whole):
    checkpoint = find_newest(list_checkpoints(whole))
    said = []

    def check(*overrides: str) -> None:
        config = config_with_defaults(checkpoint.config, checkpoint.path, overrides)
        check_architecture(checkpoint, architecture_of(config), said.append)

    check("mixers.ttt_linear.rope_theta=5e5", "model.init_std=1.0")
    assert len(said) == 1 and "mixers.ttt_linear.rope_theta=10000.0, not 500000.0" in said[0]
    for key, value in (("model.num_layers", "4"), ("mixers.ttt_linear.use_gate", "False")):
        with pytest.raises(UserError, match=rf"{key}=\w+ there, {value} here"):
            check(f"{key}={value}")
    with pytest.raises(UserError, match=r"model.pattern=\['ttt_linear'\] there, \['attention'\]"):
        check("model.pattern=[attention]")


def test_saves_in_the_background(recipe, whole, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}"]
    command += ["checkpoint.asynchronous=true", "checkpoint.milestone_every=6"]
    output = run([*command, "training.exit_step=6"])
    assert output.count("in the background; training stood still for") == 2
    assert [path.name for _, _, path in list_checkpoints(run_dir)] == [
        "checkpoint-3",
        "checkpoint-6",
        "milestone-6",
    ]
    assert "Resumed" in run(command)
    assert losses(run_dir) == losses(whole)
    for listed in list_checkpoints(run_dir):
        assert find_damage(listed.path) is None
    # The background writer's content is the foreground's, whatever the files are called.
    assert digests(run_dir / "checkpoint-8") == digests(whole / "checkpoint-8")


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_what_was_written_is_let_go_of(build_trainer, recipe, tmp_path, asynchronous):
    """It may be a copy of all weights and moments; nobody is to wait for the garbage collector."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    trainer = build_trainer(
        *recipe, f"run.dir={tmp_path}", f"checkpoint.asynchronous={asynchronous}"
    )
    trainer.train_step(next(trainer.data.train_batches(0, 1)))
    gc.collect()
    gc.disable()
    try:
        trainer.save()
        trainer.saver.wait()
        assert steps(tmp_path) == [1]
        assert not [
            held for held in gc.get_objects() if issubclass(type(held), FileSystemWriterAsync)
        ]
    finally:
        gc.enable()


def test_the_checkpoint_tool(whole, tmp_path):
    tool = [sys.executable, "tools/checkpoint.py"]
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    listed = run([*tool, "list", run_dir]).splitlines()
    assert [line.split(":")[0] for line in listed] == [f"checkpoint-{n}" for n in (3, 6, 8)]
    assert all("TP 1 x PP 1 x DP 1, not validated" in line for line in listed)
    inspected = run([*tool, "inspect", run_dir / "checkpoint-6"])
    assert "step: 6 of 8" in inspected and "pattern=['ttt_linear']" in inspected
    assert "(float32)" in inspected
    assert run([*tool, "verify", run_dir]).count(": good") == 3
    state = run_dir / "checkpoint-8/state.json"
    whole_text = state.read_text()
    state.write_text(whole_text.replace("8", "9", 1))
    output = run([*tool, "verify", run_dir / "checkpoint-6", run_dir / "checkpoint-8"], expect=2)
    assert "checkpoint-6: good" in output and "state.json has another checksum" in output
    assert "nothing was removed" in run([*tool, "prune", run_dir, "--keep", "1"], expect=2)
    evaluate = [sys.executable, "tools/evaluate.py", "--checkpoint", run_dir / "checkpoint-8"]
    assert "is damaged (state.json has another checksum)" in run(evaluate, expect=2)
    state.write_text("[]")
    assert "state.json is damaged" in run([*tool, "inspect", run_dir / "checkpoint-8"], expect=2)
    assert "checkpoint-8: state.json cannot be read" in run([*tool, "list", run_dir])
    (run_dir / "checkpoint-6/.metadata").unlink()
    assert "no complete checkpoint" in run([*tool, "inspect", run_dir / "checkpoint-6"], expect=2)
    state.write_text(whole_text)
    run([*tool, "prune", run_dir, "--keep", "1"])
    assert steps(run_dir) == [8]


def test_a_milestone_where_there_are_no_hard_links(whole, tmp_path, monkeypatch):
    def no_links(path, other):
        raise PermissionError(1, "Operation not permitted")

    shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-3")
    monkeypatch.setattr(os, "link", no_links)
    link_milestone(tmp_path / "checkpoint-3", 3)
    assert find_damage(tmp_path / "milestone-3") is None
    monkeypatch.setattr(shutil, "copyfile", no_links)
    with pytest.raises(OSError, match="Operation not permitted"):
        link_milestone(tmp_path / "checkpoint-3", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "milestone-3"]


def test_killed_at_any_moment_it_is_the_same_run(tmp_path):
    """The short version of benchmarks/kill_test.py."""
    output = tmp_path / "tally.json"
    command = [
        sys.executable,
        "benchmarks/kill_test.py",
        "--forked",
        "--kills",
        "2",
        "--steps",
        "8",
    ]
    run([*command, "--setups", "TP2 background", "--output", output])
    tally = json.loads(output.read_text())
    assert tally["total"]["in all"] == 2 and tally["total"]["inside a save"] >= 1
    assert tally["TP2 background"]["differences"] == []


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    rest = {"config": {}, "has_optimizer": True}
    for step, loss in ((1, math.nan), (2, 3.0), (3, 4.0), (4, None), (5, 3.5)):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"step": step, "val_loss": loss, **rest}))
    (tmp_path / "milestone-1").mkdir()
    gone = prune(tmp_path, keep=2)
    assert [path.name for path in gone] == ["checkpoint-1", "checkpoint-3"]
    assert steps(tmp_path) == [1, 2, 4, 5]
    assert prune(tmp_path, keep=0) == []


@pytest.fixture(scope="module")
def whole_of_two(recipe, tmp_path_factory) -> Path:
    """The folder of a run of two tensor-parallel processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole of two")
    assert begin(recipe, folder / "run", folder / "log").wait() == 0
    return folder / "run"


def test_a_signal_on_one_rank_stops_all_under_torchrun(recipe, whole_of_two, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher, processes = begin_torchrun(recipe, run_dir, log)
    wait_for(log, "Step 2:", launcher)
    processes[1].send_signal(signal.SIGTERM)
    assert launcher.wait() == 1 and "exitcode  : 75" in log.read_text()
    check_stop("SIGTERM", recipe, run_dir, log, whole_of_two)


def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(recipe, whole_of_two, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run = begin(recipe, run_dir, log)
    wait_for(log, "Step 2:", run)
    os.kill(run.pids[0], signal.SIGUSR1)
    assert run.wait() == 75
    check_stop("SIGUSR1", recipe, run_dir, log, whole_of_two)


def check_stop(signal_name: str, recipe, run_dir: Path, log: Path, whole_dir: Path) -> None:
    """A stopped run has a checkpoint of its last step, from which the same command goes on."""
    output = log.read_text()
    assert f"{signal_name} was received. The same command goes on" in output, output[-3000:]
    stopped_at = steps(run_dir)[-1]
    assert 2 <= stopped_at < STEPS
    assert find_damage(run_dir / f"checkpoint-{stopped_at}") is None
    assert begin(recipe, run_dir, log).wait() == 0, log.read_text()[-3000:]
    assert f"at step {stopped_at}\n" in log.read_text()
    assert losses(run_dir) == losses(whole_dir)


def test_stops_when_its_time_is_up(recipe, whole, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}"]
    output = run([*command, "training.exit_after_minutes=1e-4"], expect=75)
    assert "training.exit_after_minutes=0.0001 are over" in output
    assert steps(run_dir) == [1]
    run(command)
    assert losses(run_dir) == losses(whole)


def test_bad_steps_are_skipped_and_then_the_run_stops(recipe, tmp_path):
    run_dir = tmp_path / "run"
    more = ["optimizer.lr=1e30", "optimizer.warmup_fraction=0", "optimizer.decay_all=false"]
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}", *more]
    output = run([*command, "training.max_bad_steps=3"], expect=3)
    assert "error: 3 steps in a row were not finite, the last step 4" in output
    assert "first not finite is the output of layer 1" in output
    assert "Traceback" not in output
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped_steps", 0) for r in records] == [0, 1, 2, 3]


def test_a_single_bad_step_leaves_weights_and_moments(build_trainer, recipe, tmp_path):
    trainer = build_trainer(*recipe, f"run.dir={tmp_path}", "optimizer.warmup_fraction=0")
    batches = trainer.data.train_batches(0, STEPS)
    trainer.train_step(next(batches))
    inner = trainer.optimizer.chained_optimizers[0].optimizer

    def state():
        tensors = [p.detach().clone() for g in inner.param_groups for p in g["params"]]
        return tensors + [t.clone() for s in inner.state.values() for t in s.values()]

    before = state()
    hook = (
        trainer.chunks[0]
        .decoder.layers[0]
        .register_forward_hook(
            lambda module, arguments, output: (output[0] * float("nan"), *output[1:])
        )
    )
    figures = trainer.train_step(next(batches))
    hook.remove()
    assert figures["skipped_steps"] == 1 and trainer.bad_steps_in_a_row == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state()))
    figures = trainer.train_step(next(batches))
    assert np.isfinite(figures["loss"]) and trainer.bad_steps_in_a_row == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, state()))


def test_a_gradient_that_is_not_finite_is_found_where_it_is(build_trainer, recipe, tmp_path):
    from megatron_ttt.training.anomalies import first_nonfinite_module
    from megatron_ttt.training.optimizer import step_optimizer

    trainer = build_trainer(*recipe, f"run.dir={tmp_path}")
    assert trainer.config.optimizer.clip_grad > 0
    trainer.train_step(next(trainer.data.train_batches(0, STEPS)))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    trainer.chunks[0].get_parameter(name).main_grad[0] = float("nan")
    _, skipped = step_optimizer(trainer.optimizer, torch.tensor(1.0))
    assert skipped == 1
    place = first_nonfinite_module(trainer.chunks, lambda: None)
    assert place == f"the gradient of layer 2 ({name})"


@pytest.mark.parametrize("tensor_parallel", [2, 1])
def test_a_replica_that_differs_is_found(tmp_path, tensor_parallel):
    layout = f"parallel.tensor_model_parallel_size={tensor_parallel}"
    script = ROOT / "tests/differing_replicas.py"
    output = torchrun(2, script, layout, f"run.dir={tmp_path}")
    assert "before [], after ['decoder.final_layernorm.weight']" in output


def test_a_spike_is_said_once_it_is_one():
    from megatron_ttt.training.anomalies import SpikeWatch

    random = np.random.default_rng(0)
    watch = SpikeWatch("loss")
    quiet = [watch.see(3 + 0.1 * random.standard_normal()) for _ in range(300)]
    assert quiet == [None] * 300
    assert "loss=5 is a spike: it was 3.0" in watch.see(5.0)
    assert watch.see(float("nan")) is None


def test_changed_data_is_refused(recipe, whole, tmp_path):
    run_dir, tokens = tmp_path / "run", tmp_path / "tokens.npy"
    shutil.copy(recipe[0].partition("=")[2], tokens)
    command = [sys.executable, *COMMAND, *recipe, f"data.fixed_batches={tokens}"]
    command += [f"run.dir={run_dir}"]
    run([*command, "training.exit_step=1"])
    content = bytearray(tokens.read_bytes())
    content[-1] ^= 1
    tokens.write_bytes(content)
    output = run(command, expect=2)
    assert output.endswith("another run.dir to start anew\n") and output.count("\n") == 1
    assert f"{tokens} has changed since this run began" in output
    content[-1] ^= 1
    tokens.write_bytes(content)
    run(command)
    assert losses(run_dir) == losses(whole)
