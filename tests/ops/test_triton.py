"""The Triton kernels against the naive form in float64: interpreted, or compiled on a GPU."""

import json
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, environment, finish, further, one_here
from test_scan import inputs

from megatron_ttt.mixers.ttt import scan as scans
from megatron_ttt.mixers.ttt.scan import INNER_MODELS, LINEAR, MLP, ttt_scan

pytest.importorskip("triton")
SHORT = "a part of the gradients"
CASES = (
    "groups",
    "ragged, a state per sequence",
    "shorter than a mini-batch",
    "head_dim 64",
    "head_dim 96",
    "head_dim 64, mini-batches of 64",
    "head_dim 20, mini-batches of 32",
    "bf16 groups, a state per sequence",
    "bf16 head_dim 128, mini-batches of 64",
    "a state that grows",
)


# Interpreted, the wide ones take minutes.
HERE = {"linear": (*CASES[:4], CASES[7], CASES[-1], SHORT), "mlp": CASES[:1]}
ALL = [(kind, case) for kind in HERE for case in CASES]


def measured(kind: str, case: str) -> dict | None:
    """What triton_cases.py says of a case."""
    together = [name for name in (*CASES, SHORT) if (name in HERE[kind]) == (case in HERE[kind])]
    return results(kind, tuple(together)).get(case)


@cache
def results(kind: str, cases: tuple[str, ...]) -> dict:
    """What triton_cases.py says of some cases, in one process."""
    env = environment()
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    paths = (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/ops"))
    env["PYTHONPATH"] = os.pathsep.join(paths)
    script = Path(__file__).with_name("triton_cases.py")
    # Triton decides at import whether kernels are interpreted.
    done = finish([sys.executable, script, kind, *cases], env=env, forked=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind,case", [c if c[1] in HERE[c[0]] else further(c) for c in ALL])
def test_kernels_compute_the_naive_form(kind, case):
    """Outputs, states and gradients, written all over NaN-filled buffers; twice the same bits."""
    result = measured(kind, case)
    if result is None:
        pytest.skip("interpreted only: triton_cases.py says why")
    assert "failed" not in result, result
    bound = 2e-2 if case.startswith("bf16") else 1e-5
    if case == "a state that grows" and kind == "mlp":
        bound = 2e-4  # the naive form, in float32, has a tenth of it
    for name, error in result["errors"].items():
        assert error < bound, name  # NaN is not
    assert result["repeats"]
    assert result["same without gradients"]


@pytest.mark.parametrize("kind", one_here(["linear", "mlp"]))
def test_a_part_of_the_gradients(kind):
    """Of the outputs alone, for some of the inputs, inside activation checkpointing."""
    for name, error in measured(kind, SHORT)["errors"].items():
        assert error < 1e-5, name


def like_on_cuda(x: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda"), shape=x.shape, dtype=x.dtype)


@pytest.mark.parametrize(
    "F,K,dtype,reason",
    [
        (8, 16, torch.float32, "head_dim is 8: they take 16 to 128"),
        (16, 4, torch.float32, "mini_batch_size is 4: they take 16, 32 or 64"),
        (16, 16, torch.float64, "they compute in float32, not torch.float64"),
    ],
)
def test_says_what_the_kernels_cannot_run(F, K, dtype, reason):
    """Asked for by name they refuse; `auto` takes PyTorch and says so once."""
    tensors = inputs("linear", 1, 1, 8, F, K, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]), backend="triton")

    on_cuda = like_on_cuda(tensors[0])
    scans.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        assert (
            scans.select_backend(scans.describe(LINEAR, on_cuda, tensors[4], tensors[7:]))
            == "torch"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            scans.select_backend(scans.describe(LINEAR, on_cuda, tensors[4], tensors[7:]))
            == "torch"
        )


@pytest.mark.parametrize(
    "kind,F,K,dtype,least",
    [
        ("mlp", 96, 16, torch.bfloat16, 99),
        ("mlp", 64, 32, torch.bfloat16, 99),
        ("mlp", 20, 64, torch.bfloat16, 163),
        ("linear", 96, 64, torch.bfloat16, 99),
        ("mlp", 128, 32, torch.float32, 163),
        ("mlp", 64, 64, torch.float32, 227),
        ("linear", 96, 64, torch.float32, 227),
    ],
)
def test_shared_memory_decides_which_tiles_a_gpu_takes(kind, F, K, dtype, least, monkeypatch):
    from megatron_ttt.mixers.ttt.triton import scan

    for there in (99, 163, 227):  # an RTX 4090, an A100, an H100
        monkeypatch.setattr(scan, "shared_kib", lambda device, there=there: there)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        model = INNER_MODELS[kind]
        problem = scans.ScanProblem(model, F, K, dtype, torch.float32, "cuda")
        reason = scans.unsupported_reason("triton", problem)
        assert (reason is None) == (there >= least), reason
        assert reason is None or f"KiB of shared memory, this GPU has {there}" in reason


def test_auto_takes_the_kernels_on_cuda(monkeypatch):
    from megatron_ttt.mixers.ttt.triton import scan

    monkeypatch.setattr(scan, "shared_kib", lambda device: 163)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tensors = inputs("mlp", 1, 1, 8, 96, 16, dtype=torch.float32)
    on_cuda = like_on_cuda(tensors[0])
    assert scans.select_backend(scans.describe(MLP, on_cuda, tensors[4], tensors[7:])) == "triton"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="there is one choice")
def test_a_deterministic_run_takes_a_choice_without_timing_it():
    from megatron_ttt.mixers.ttt.mlp.forward_kernel import mlp_forward
    from megatron_ttt.mixers.ttt.triton.common import TRITON_DTYPE, worth_trying

    sizes = {"P": 64, "M": 256}
    timed = worth_trying(mlp_forward.configs, {}, **sizes)
    torch.use_deterministic_algorithms(True)
    try:
        fixed = worth_trying(mlp_forward.configs, {}, **sizes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(timed) > 1 and fixed == timed[:1]
    of_float32 = worth_trying(mlp_forward.configs, {}, **sizes, DOT=TRITON_DTYPE[torch.float32])
    assert [choice.num_warps for choice in of_float32] == [8]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="they are interpreted")
def test_needs_a_gpu_or_the_interpreter():
    tensors = inputs("linear", 1, 1, 16, 16, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="they need a CUDA device, not cpu"):
        ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]), backend="triton")
