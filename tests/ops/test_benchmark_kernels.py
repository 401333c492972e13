"""The kernels' benchmark runs its whole course where it can, and says so where it cannot."""

import json
import sys

import pytest
import torch
from harness import ROOT, environment, finish

pytest.importorskip("triton")


def benchmark(*arguments, **extra):
    command = [sys.executable, ROOT / "benchmarks/kernels.py", *arguments]
    # Triton reads whether it is to interpret when it is imported.
    return finish(command, forked=False, env={**environment(), "PYTHONPATH": str(ROOT), **extra})


@pytest.mark.compile
def test_checks_and_times_every_form(tmp_path):
    output = tmp_path / "result.json"
    extra = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = benchmark("--quick", "--output", output, **extra)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(output.read_text())
    assert len(result["checked"]) == 4
    assert all(c["error"] <= c["bound"] for c in result["checked"])
    timed = {(r["kind"], r["form"]) for r in result["timed"]}
    forms = ("triton", "torch", "naive")
    assert timed >= {(kind, form) for kind in ("linear", "mlp") for form in forms}
    assert ("linear", "attention") in timed
    assert [test["exit_code"] for test in result["tests"]] == [0]
    around = {(r["what"], r["form"]) for r in result["around"]}
    assert len(around) == 6 and all(form in ("triton", "torch") for _, form in around)
    assert result["left_out"] == result["failed"] == [] and len(result["ceilings"]) == 1
    recipes = [record["recipe"] for record in result["training_steps"]]
    assert recipes == ["ttt_linear_125m", "ttt_mlp_125m", "transformer_125m"]
    for record in result["training_steps"]:
        shares = [kernel["share"] for kernel in record["slowest_kernels"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 1.001, record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    output = tmp_path / "result.json"
    done = benchmark("--output", output)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert not output.exists()
