"""What the recipes launch compiles ahead of time for sm_80 and sm_90, on any machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import environment

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("compiled") / "records.json"
    env = environment()
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, script, "--choices", "1", "--output", output]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def test_every_variant_compiles(records):
    """TTT-Linear and TTT-MLP, both passes, heads of 64 and 96, two generations of GPUs."""
    variants = {(r["kernel"], r["head_dim"], r["target"]) for r in records}
    kernels = [f"{kind}_{way}" for kind in ("linear", "mlp") for way in ("forward", "backward")]
    assert variants == {(k, F, t) for k in kernels for F in (64, 96) for t in ("sm_80", "sm_90")}
    assert {r["operands"] for r in records} == {"bfloat16"}


def test_shared_memory_fits_a_multiprocessor(records):
    for record in records:
        assert 0 < record["shared_bytes"] <= record["shared_limit"], record


def test_heads_of_64_hardly_spill_on_sm_90(records):
    """Registers that do not fit cost loads from local memory; the bound is what is known."""
    for record in records:
        if record["head_dim"] == 64 and record["target"] == "sm_90":
            bound = 2048 if record["kernel"] == "mlp_backward" else 512
            assert record["local_bytes"] <= bound, record
