"""The kernels round the scan against PyTorch in float64: interpreted, or compiled on a GPU."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, torchrun

from megatron_ttt.ops.fused import can_use_fused_kernels

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
CASES = [
    "conv_rope",
    "rmsnorm_conv",
    "layernorm_gate",
    *([] if ON_GPU else ["layernorm_gate on two ranks"]),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """What fused_cases.py says."""
    output = tmp_path_factory.mktemp("fused") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        paths = (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/ops"))
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        script = Path(__file__).with_name("fused_cases.py")
        torchrun(1 if ON_GPU else 2, script, output, forked=False)
    return json.loads(output.read_text())


@pytest.mark.parametrize("dtype,bound", [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_what_pytorch_does(measured, case, dtype, bound):
    """Outputs and all gradients, into NaN-filled buffers; twice the same bits."""
    result = measured[f"{dtype} {case}"]
    assert all(error < bound for error in result["errors"]), result  # NaN is not
    assert result["repeats"]


def test_sequences_shorter_than_the_convolution(measured):
    assert max(measured["fp32 conv_rope, short"]["errors"]) < 1e-5


def test_kernels_are_for_cuda():
    def runs(device, dtype):
        return can_use_fused_kernels(SimpleNamespace(device=torch.device(device), dtype=dtype))

    assert runs("cuda", torch.bfloat16) and runs("cuda", torch.float32)
    assert not runs("cpu", torch.bfloat16) and not runs("cuda", torch.float64)
