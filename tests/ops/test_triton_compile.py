"""What the recipes launch compiles ahead of time for sm_80 and sm_90, on any machine."""

import json
import sys
from pathlib import Path

import pytest
import torch
from harness import environment, finish

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.compile


def compiled(output: Path, *arguments: str) -> list[dict]:
    """The records of the first choices."""
    env = environment()
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, script, "--choices", "1", "--output", output, *arguments]
    done = finish(command, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    return compiled(tmp_path_factory.mktemp("compiled") / "records.json")


def test_every_variant_compiles(records):
    """Both passes of TTT-Linear, TTT-MLP and what stands round them, heads of 64 and 96, two
    generations of GPUs."""
    from compile_triton import KERNELS

    variants = {(r["kernel"], r["head_dim"], r["target"]) for r in records}
    assert variants == {(k, F, t) for k in KERNELS for F in (64, 96) for t in ("sm_80", "sm_90")}
    assert {r["operands"] for r in records} == {"bfloat16"}


def test_shared_memory_fits_a_multiprocessor(records):
    for record in records:
        assert 0 <= record["shared_bytes"] <= record["shared_limit"], record


def test_shared_memory_is_what_a_scan_is_chosen_by(records):
    from megatron_ttt.mixers.ttt.triton.scan import SHARED_KIB

    found = 0
    for record in records:
        kind = record["kernel"].split("_")[0]
        if record["target"] == "sm_80" and (kind, torch.bfloat16) in SHARED_KIB:
            known = SHARED_KIB[kind, torch.bfloat16][16, 64 if record["head_dim"] == 64 else 128]
            assert record["shared_bytes"] <= known * 1024, record
            found += 1
    assert found == 2 * 2 * 2


@pytest.mark.parametrize("kernel", ["linear_backward", "mlp_backward"])
def test_the_largest_tiles_fit_too(kernel, tmp_path):
    """Mini-batches of 64, heads of 128, on the GPUs they are taken on."""
    sizes = ["--head-dims", "128", "--mini-batch", "64", "--targets", "90"]
    (record,) = compiled(tmp_path / "records.json", "--kernel", kernel, *sizes)
    assert 0 < record["shared_bytes"] <= record["shared_limit"], record


@pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="each ptxas has its own")
def test_heads_of_64_spill_no_more_than_is_known(records):
    """Registers that do not fit cost loads from local memory; the bound is what is known."""
    for record in records:
        if record["head_dim"] == 64 and record["target"] == "sm_90":
            bound = 1024 if record["kernel"] == "mlp_backward" else 512
            assert record["local_bytes"] <= bound, record
