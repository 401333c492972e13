"""Silent corruption of the optimizer's state is found, and nothing else is taken for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import LAYOUTS, ROOT, torchrun

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_manifest
from megatron_ttt.errors import TrainingError

PRETRAIN = [ROOT / "pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    """Overrides of a small run in bf16; two tensor-parallel ranks pad its vocabulary."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(2, 95, (4, 4, 33)))
    return [
        f"data.fixed_batches={tokens}",
        "data.train=[]",
        "data.validation=[]",
        "data.tokenizer_model=null",
        "training.steps=4",
        "training.seq_length=32",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        "training.precision=bf16",
        "training.check_replicas_every=1",
        "optimizer.warmup_fraction=0",
        "model.vocab_size=95",
        "model.num_layers=4",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "checkpoint.save_every=2",
    ]


@pytest.mark.parametrize(
    "layout,mode,what,said",
    [
        ("tp2", "at once", "none", "nothing"),
        # Later chunks' bf16 and fp32 weights, gathered in one coalesced call under gloo, were lost.
        ("pp2vpp2", "background", "none", "nothing"),
        ("tp2", "at once", "moment", "copies of the optimizer state of 1 parameters differ"),
        ("tp2", "background", "moment", "copies of the optimizer state of 1 parameters differ"),
        ("dp2", "at once", "main", "1 parameters are not what the optimizer's main parameters"),
        ("dp2", "background", "main", "1 parameters are not what the optimizer's main parameters"),
    ],
)
def test_a_flipped_bit_is_found(recipe, tmp_path, layout, mode, what, said):
    """And what has it is not published."""
    script, background = ROOT / "tests/corrupted_optimizer.py", mode == "background"
    options = [f"run.dir={tmp_path}", f"checkpoint.asynchronous={str(background).lower()}"]
    output = torchrun(2, script, what, *LAYOUTS[layout], *recipe, *options)
    assert f"said: {said}" in output, output[-2000:]
    if what == "none":
        assert "saved: ['checkpoint-1', 'latest']" in output
        state = json.loads((tmp_path / "checkpoint-1/state.json").read_text())
        assert "decoder.final_layernorm.weight" in state["optimizer_checksums"]
    else:
        assert "at step 1, decoder.final_layernorm.weight among them" in output
        assert "saved: []" in output


def test_what_a_checkpoint_gives_back_is_what_was_saved(build_trainer, recipe, tmp_path):
    """At the layouts that cut and pad most differently; and not if one bit of it is another."""

    run_dir = tmp_path / "run"
    parts = [("tp2", "training.exit_step=2"), ("pp2", "training.exit_step=3"), ("dp2", "")]
    for layout, stop in parts:
        options = [*LAYOUTS[layout], *recipe, f"run.dir={run_dir}", *([stop] if stop else [])]
        torchrun(2, *PRETRAIN, *options)
    states = sorted(run_dir.glob("checkpoint-*/state.json"))
    assert [path.parent.name for path in states] == [f"checkpoint-{n}" for n in (2, 3, 4)]

    def load(state_file: Path, change=lambda sums: None) -> None:
        """Make a trainer of the checkpoint, whose recorded checksums may be changed before."""
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(state_file.parent, folder)
        state = json.loads((folder / "state.json").read_text())
        change(state["optimizer_checksums"])
        (folder / "state.json").write_text(json.dumps(state))
        write_manifest(folder, {name: describe(folder / name) for name in folder_files(folder)})
        build_trainer(*recipe, f"run.dir={tmp_path}/new", f"checkpoint.load={folder}")

    for state_file in states:
        load(state_file)
    sums = json.loads(states[-1].read_text())["optimizer_checksums"]
    assert len(sums) == len(set(sums.values())) and all(len(s.split()) == 3 for s in sums.values())

    def flip(sums):
        first, second, third = sums["decoder.layers.1.self_attention.W1"].split()
        second = f"{int(second, 16) ^ 1 << 7:08x}"
        sums["decoder.layers.1.self_attention.W1"] = f"{first} {second} {third}"

    with pytest.raises(TrainingError, match=r"exp_avg of decoder\.layers\.1\.self_attention\.W1"):
        load(states[-1], flip)


def test_any_flipped_bit_changes_a_checksum():
    from megatron_ttt.training.optimizer_checks import checksum

    values = torch.randn(1000)
    before = checksum(values)
    parts = sum(checksum(part) for part in values.split([1, 330, 669]))
    assert (parts - before) % 2**32 == 0
    for bit in range(32):
        flipped = values.clone()
        flipped.view(torch.int32)[bit * 7] ^= -(2**31) if bit == 31 else 1 << bit
        assert (checksum(flipped) - before) % 2**32 != 0
