"""Hooks: when a trainer calls them, and what they can do to a run."""

import json
from pathlib import Path

import pytest
from small_run import STEPS, losses, small_recipe, steps

from megatron_ttt.training.hooks import Hook
from megatron_ttt.training.lost_ranks import Progress


class Losses(Hook):
    """Records each step's loss, and adds a figure of its own."""

    def __init__(self):
        self.losses = []

    def on_step_end(self, trainer, figures, microbatches):
        self.losses.append(figures["loss"])
        figures["sequences"] = sum(len(tokens) for tokens in microbatches)


class Calls(Hook):
    """Records every call, with the step, what the run is doing, and how far the log is."""

    def __init__(self, progress: Progress):
        self.progress, self.calls, self.error = progress, [], None

    def note(self, name: str, trainer) -> None:
        self.calls.append((name, trainer.step, self.progress.step, self.progress.doing))

    def on_train_start(self, trainer):
        self.note("train starts", trainer)

    def on_step_start(self, trainer):
        self.note("step starts", trainer)

    def on_step_end(self, trainer, figures, microbatches):
        self.note("step ends", trainer)

    def on_validation_start(self, trainer):
        self.note("validation starts", trainer)

    def on_validation_end(self, trainer, loss):
        assert 0 < loss < 10
        self.note("validation ends", trainer)

    def on_save_start(self, trainer):
        assert trainer.step not in steps(trainer.run_dir)
        assert losses(trainer.run_dir)[-1][0] == trainer.step
        self.note("save starts", trainer)

    def on_save_end(self, trainer):
        assert trainer.step in steps(trainer.run_dir)
        self.note("save ends", trainer)

    def on_train_end(self, trainer, error):
        self.error = error
        self.note("train ends", trainer)


class Failure(Hook):
    """Ends a run after a step."""

    def on_step_end(self, trainer, figures, microbatches):
        if trainer.step == 2:
            raise ArithmeticError("enough")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return small_recipe(tmp_path_factory.mktemp("tokens"))


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_hook_records_losses(build_trainer, recipe, tmp_path):
    hook = Losses()
    build_trainer(*recipe, f"run.dir={tmp_path}", hooks=[hook]).train()
    assert len(hook.losses) == STEPS
    assert hook.losses == [loss for _, loss, _ in losses(tmp_path)]
    assert [record["sequences"] for record in records(tmp_path)] == [4] * STEPS


def test_each_method_is_called_when_it_says(build_trainer, recipe, tmp_path, monkeypatch):
    progress = Progress()
    hook = Calls(progress)
    options = ["training.steps=4", "training.eval_every=2", "checkpoint.save_every=3"]
    options += [f"run.dir={tmp_path}", "checkpoint.asynchronous=false"]
    trainer = build_trainer(*recipe, *options, hooks=[progress, hook])
    batch = next(trainer.data.train_batches(0, 1))
    monkeypatch.setattr(type(trainer.data), "validation_batches", lambda data: batch)
    assert trainer.train() is None

    def step(number: int) -> list[tuple]:
        doing = (number, "training")
        return [("step starts", number - 1, *doing), ("step ends", number, *doing)]

    def around(what: str, number: int, doing: str) -> list[tuple]:
        return [(f"{what} {when}", number, number, doing) for when in ("starts", "ends")]

    assert hook.calls == [
        ("train starts", 0, 0, "starting up"),
        *step(1),
        *step(2),
        *around("validation", 2, "validating"),
        *step(3),
        *around("save", 3, "saving"),
        *step(4),
        *around("validation", 4, "validating"),
        *around("save", 4, "saving"),
        ("train ends", 4, 4, "exporting"),
    ]
    assert [r["step"] for r in records(tmp_path) if "val_loss" in r] == [2, 4]


def test_a_hook_ends_a_run(build_trainer, recipe, tmp_path):
    progress = Progress()
    hook = Calls(progress)
    trainer = build_trainer(*recipe, f"run.dir={tmp_path}", hooks=[progress, hook, Failure()])
    with pytest.raises(ArithmeticError, match="enough") as raised:
        trainer.train()
    assert hook.calls[-1] == ("train ends", 2, 2, "training") and hook.error is raised.value
    assert steps(tmp_path) == []
