"""A short version of `make quickstart`: every stage, a few steps."""

import json
import math
import os
import re
import sys

from harness import ROOT, run


def test_every_stage_runs(tmp_path):
    for name in ("tools", "yaml_recipes", "pretrain_ttt.py"):
        os.symlink(ROOT / name, tmp_path / name)
    options = ["training.steps=6", "training.eval_batches=1", "checkpoint.milestone_every=3"]
    options += ["checkpoint.export_milestones=true"]
    output = run([sys.executable, "tools/quickstart.py", *options], cwd=tmp_path)
    # The checkpoint and the milestone of a step are the same files.
    assert re.search(r"Resumed from runs/quickstart/run/\w+-3 at step 3", output)
    assert "Exported runs/quickstart/run/milestone-3-hf" in output
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 16 * 256
    assert (tmp_path / summary["checkpoint_dir"] / "state.json").exists()
    for name in ("loss_first", "loss_last", "val_loss", "val_loss_no_inner", "unigram_entropy"):
        assert math.isfinite(summary[name]), name
    assert summary["loss_last"] < summary["loss_first"]
    # The entropy of a real text under a tokenizer of 2,048 pieces, not of noise (7.6 nats).
    assert 5 < summary["unigram_entropy"] < 7
    # The export was made by the training run, and what is in the summary is what it wrote.
    model = tmp_path / summary["hf_dir"]
    for name in ("model.safetensors", "config.json", "modeling_ttt.py", "tokenizer.json"):
        assert (model / name).exists(), name
    card = (model / "README.md").read_text()
    assert "steps: 6 of 6, 24,576 tokens" in card and "validation loss at the last step" in card
    assert summary["sample"].startswith("The function returns")
    assert len(summary["sample"]) > len("The function returns")
    milestone = tmp_path / "runs/quickstart/run/milestone-3-hf"
    assert (milestone / "tokenizer.json").exists()
    assert "steps: 3 of 6, 12,288 tokens" in (milestone / "README.md").read_text()
