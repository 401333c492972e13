"""What `--dry-run` says, against processes that do it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from harness import LAYOUTS, PROCESSES, ROOT, finish, one_here, run, torchrun
from torch.utils.flop_counter import FlopCounterMode

from megatron_ttt.config import ModelConfig, check_layout, load_config
from megatron_ttt.errors import UserError
from megatron_ttt.mixers import MIXERS
from megatron_ttt.mixers.ttt.reference import reference_scan
from megatron_ttt.mixers.ttt.scan import INNER_MODELS
from megatron_ttt.planning import dry_run, memory_per_rank
from megatron_ttt.planning.communication import bytes_per_step
from megatron_ttt.planning.cost import (
    DEVICES,
    checkpoint_bytes,
    find_device,
    forward_flops_per_token,
    peak_flops,
)
from megatron_ttt.planning.layouts import rank_layouts, step_seconds
from megatron_ttt.stack import Architecture

RECIPES = ROOT / "yaml_recipes"
# The 125m recipes with fewer layers, half the vocabulary and one short sequence. In bf16 much less:
# a CPU without bf16 units multiplies a hundred times slower than in float32.
SCALED_DOWN = {
    "fp32": ["model.num_layers=4", "model.vocab_size=16000", "training.seq_length=1024"],
    "bf16": ["model.num_layers=2", "model.vocab_size=4000", "training.seq_length=128"],
}


@pytest.mark.memory
@pytest.mark.parametrize("precision", SCALED_DOWN)
@pytest.mark.parametrize("layer", ["ttt_linear", "ttt_mlp", "transformer"])
def test_memory_estimate_is_the_measured_peak(layer, precision):
    command = [sys.executable, "benchmarks/memory_estimate.py", "--child"]
    command += ["--config", f"yaml_recipes/{layer}_125m.yaml", *SCALED_DOWN[precision]]
    command += [f"training.precision={precision}", "training.micro_batch_size=1"]
    done = finish(command)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["precision"] == precision
    assert abs(result["error"]) < 0.15, result


@pytest.mark.parametrize(
    "name,known",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_their_driver_s_names(name, known):
    assert find_device(name) is DEVICES[known]
    assert peak_flops(name) == DEVICES[known].flops


def test_refuses_plans_of_nothing():
    config = load_config([RECIPES / "ttt_linear_125m.yaml"])
    assert peak_flops("a toaster") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    for gpu, memory in (("", None), ("a toaster", None), ("H100", float("nan")), ("H100", -1.0)):
        with pytest.raises(UserError, match=r"--(gpu|memory)"):
            dry_run(config, 8, gpu=gpu, memory_gib=memory)


# What pipeline and data parallelism send does not depend on the mixer.
SENT = [("ttt_linear", "tp2sp"), ("attention", "tp2sp"), ("ttt_linear", "tp2")]
SENT += [("ttt_linear", "pp2"), ("ttt_linear", "dp2")]


@pytest.mark.parametrize("layer,layout", one_here(SENT))
def test_bytes_sent_are_those_a_rank_sends(layer, layout, tmp_path):
    overrides = [
        *LAYOUTS[layout],
        *(f"model.pattern={layer}", "model.num_layers=4", "model.vocab_size=512"),
        *("training.global_batch_size=8", "training.micro_batch_size=2"),
        *("data.train=[]", "data.validation=[]", "data.tokenizer_model=null"),
        *(f"data.fixed_batches={ids(tmp_path)}", f"run.dir={tmp_path}/run"),
    ]
    recipe = RECIPES / "debug_cpu.yaml"
    # Not forked: it wraps collectives before megatron-core takes them at import.
    script = ROOT / "tests/sent_bytes.py"
    torchrun(2, script, tmp_path / "sent.json", recipe, *overrides, forked=False)
    sent = json.loads((tmp_path / "sent.json").read_text())
    config = load_config([recipe], overrides)
    planned = bytes_per_step(config, check_layout(config, PROCESSES.get(layout, 2)))
    kind = {"tp": "tensor", "pp": "pipeline", "dp": "data"}[layout[:2]]
    # At the end of a pipeline a rank sends one way only; the plan is of a rank in the middle.
    embedding = 4 * config.model.hidden_size * config.model.vocab_size
    expected = planned[kind]
    if kind == "pipeline":
        expected = (planned[kind] - embedding) / 2 + embedding
    assert sent[kind] == pytest.approx(expected, rel=0.05), (sent, planned)


def ids(folder: Path) -> Path:
    """Batches for `data.fixed_batches`, which the worker does not read."""
    import numpy as np

    np.save(folder / "ids.npy", np.zeros((20, 8, 129), np.int64))
    return folder / "ids.npy"


def test_checkpoint_bytes_are_those_on_disk(tmp_path):
    overrides = [
        *("data.train=[]", "data.validation=[]", "data.tokenizer_model=null"),
        *(f"data.fixed_batches={ids(tmp_path)}", f"run.dir={tmp_path}/run"),
        *("training.exit_step=1", "training.precision=bf16", "model.hidden_size=256"),
    ]
    recipe = RECIPES / "debug_cpu.yaml"
    run([sys.executable, "pretrain_ttt.py", "--config", recipe, *overrides])
    files = (tmp_path / "run/checkpoint-1").rglob("*.distcp")
    expected = checkpoint_bytes(load_config([recipe], overrides))["checkpoint"]
    assert sum(file.stat().st_size for file in files) == pytest.approx(expected, rel=0.05)


def test_more_processes_hold_and_more_microbatches_wait():
    def total(*overrides, dp=1, on_cpu=False):
        config = load_config([RECIPES / "ttt_mlp_1b.yaml"], [*overrides])
        return sum(memory_per_rank(config, dp, on_cpu=on_cpu).values())

    tp2 = "parallel.tensor_model_parallel_size=2"
    assert total(tp2, "parallel.sequence_parallel=true") < total(tp2) < total()
    assert total(dp=8) < total()
    assert total("training.recompute=true") < total()
    assert total("training.micro_batch_size=2") > total()
    assert total("parallel.pipeline_model_parallel_size=4") < total()
    # On the CPU PyTorch's scan keeps float32, the kernels of a GPU keep bf16.
    assert total(on_cpu=True) > total()


def test_a_ranking_holds_only_what_can_be_trained_and_fits():
    config = load_config([RECIPES / "ttt_mlp_1b.yaml"])
    device = DEVICES["A100"]
    layouts = rank_layouts(config, 64, device, 0.4, 20.0)
    assert len({(x.tensor, x.pipeline, x.micro_batch_size) for x in layouts}) == len(layouts) > 10
    times = [layout.step_seconds for layout in layouts]
    assert times == sorted(times)
    for layout in layouts:
        chosen = load_config([RECIPES / "ttt_mlp_1b.yaml"], layout.overrides())
        assert check_layout(chosen, 64) == layout.data
        assert sum(memory_per_rank(chosen, layout.data, on_cpu=False).values()) <= 20.01
        assert step_seconds(chosen, 64, device, 0.4)["seconds"] == pytest.approx(
            layout.step_seconds, abs=1e-4
        )
    assert rank_layouts(config, 1, device, 0.4, 1.0) == []
    # Where it does not fit without, it is recomputed.
    assert any(x.recompute for x in rank_layouts(config, 1, device, 0.4, 30.0))


@pytest.mark.parametrize("layer", ["ttt_linear", "ttt_mlp"])
def test_flops_of_the_scan_are_those_of_the_naive_form(layer):
    H, F, K, N = 2, 16, 4, 3
    inner_model = INNER_MODELS[layer.removeprefix("ttt_")]
    state = tuple(torch.zeros(1, H, *shape) for shape in inner_model.state_shapes(F).values())
    tokens = [torch.randn(1, H, N * K, F) for _ in range(3)]
    gates = torch.rand(1, H, N * K), torch.rand(K), torch.ones(H, F), torch.zeros(H, F)
    with FlopCounterMode(display=False) as counter:
        reference_scan(inner_model, *tokens, *gates, state)
    plain = {"vocab_size": 0, "ffn_hidden_size": 0, "num_layers": 1}
    model = ModelConfig(pattern=[layer], hidden_size=H * F, num_heads=H, **plain)
    mixers = {layer: MIXERS[layer].Options(mini_batch_size=K)}
    counted = (
        forward_flops_per_token(Architecture(model, mixers), N * K) - 8 * (H * F) ** 2
    )  # the projections
    assert counter.get_total_flops() == N * K * counted


def test_step_time_is_the_flops_over_what_is_reached():
    config = load_config([RECIPES / "ttt_linear_125m.yaml"])
    device = DEVICES["H100"]
    plan = dry_run(config, 1, gpu="H100", mfu=0.5)
    flops = plan["flops_per_token"] * plan["tokens_per_step"]
    assert plan["step_seconds"] == pytest.approx(flops / (0.5 * device.flops), rel=1e-3)
    assert plan["hours"] == pytest.approx(plan["step_seconds"] * 4800 / 3600, rel=1e-2)


def test_a_plan_for_a_device_says_what_fits():
    config = load_config([RECIPES / "ttt_mlp_760m.yaml"], ["training.micro_batch_size=32"])
    plan = dry_run(config, 8, gpu="NVIDIA RTX 4090")
    assert not plan["fits"]
    assert plan["layouts"] and all(x["memory_gib"] <= 24 for x in plan["layouts"])
    for arguments in ({"gpu": "Abacus"}, {"mfu": 0.4}, {"gpu": "H100", "mfu": 40.0}):
        with pytest.raises(UserError):
            dry_run(config, 8, **arguments)


def test_sweep_prints_a_table_and_writes_json(tmp_path):
    command = [sys.executable, "tools/sweep_layouts.py", "--config", RECIPES / "ttt_mlp_350m.yaml"]
    command += ["--world-size", 8, "--gpu", "H100", "--mfu", 0.4, "--top", 3]
    output = run([*command, "--json", tmp_path / "layouts.json"])
    layouts = json.loads((tmp_path / "layouts.json").read_text())
    assert len(output.splitlines()) == 4
    assert " ".join(layouts[0]["overrides"]) in output.splitlines()[1]
    assert "fits" in run([*command, "--memory", 0.1], expect=2)
