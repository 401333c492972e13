"""The C++ scan against the naive one in float64, and where its library comes from."""

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from harness import relative
from test_scan import CASES, NAMES, inputs, needs_cpp, run

from megatron_ttt.mixers.ttt import scan as scans
from megatron_ttt.mixers.ttt.cpp import build
from megatron_ttt.mixers.ttt.scan import INNER_MODELS, LINEAR, ttt_scan

# Widths between vectors', a mini-batch of more than one, and states that are kept and restored.
MORE_CASES = [(1, 3, 50, 20, 8, False), (1, 2, 53, 24, 20, True), (1, 2, 16 * 32 + 3, 8, 16, False)]


def errors(kind, case):
    """Relative errors of outputs, final state and gradients, by name."""
    *sizes, per_batch = case
    # Seeded: of a single token tau's gradient may cancel to next to nothing.
    tensors = inputs(kind, *sizes, dtype=torch.float32, per_batch=per_batch, seed=0)
    results, gradients, upstream = run(kind, tensors, "cpp")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected, expected_gradients, _ = run(kind, exact, "naive", [x.double() for x in upstream])
    states = [f"state {i}" for i in range(len(tensors) - 7)]
    names = ["output", *(f"final {name}" for name in states), *NAMES, *states]
    ours, theirs = [*results, *gradients], [*expected, *expected_gradients]
    assert all(x.dtype == torch.float32 for x in ours)
    return {name: relative(a, b) for name, a, b in zip(names, ours, theirs)}


@needs_cpp
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_is_the_naive_scan(kind, case):
    found = errors(kind, case)
    assert max(found.values()) < 1e-5, found


@needs_cpp
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_any_number_of_threads_and_any_strides_give_the_same_bits(kind):
    tensors = inputs(kind, 2, 3, 85, 16, 16, dtype=torch.float32)
    results, gradients, upstream = run(kind, tensors, "cpp")

    def laid_out_by_token(x):
        """As the layers have it, [B, L, H, F] and a part of a longer row."""
        x = x.detach().movedim(1, 2)
        return torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]].movedim(2, 1)

    strided = [laid_out_by_token(x).requires_grad_() for x in tensors[:3]] + tensors[3:]
    upstream[0] = laid_out_by_token(upstream[0])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again, again_gradients, _ = run(kind, strided, "cpp", upstream)
            assert all(map(torch.equal, (*again, *again_gradients), (*results, *gradients)))
    finally:
        torch.set_num_threads(threads)
    assert again[0].movedim(1, 2).is_contiguous()


@needs_cpp
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_goes_on_from_its_final_state(kind):
    tensors = inputs(kind, 2, 2, 85, 16, 16, dtype=torch.float32)
    whole, final = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend="cpp")
    parts, state = [], tuple(tensors[7:])
    for stretch in (slice(0, 32), slice(32, 80), slice(80, 85)):
        tokens = [x[:, :, stretch] for x in tensors[:4]]
        out, state = ttt_scan(INNER_MODELS[kind], *tokens, *tensors[4:7], state, backend="cpp")
        parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole)
    assert all(map(torch.equal, state, final))


@needs_cpp
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_token_that_is_no_number_stays_in_its_head_and_after_it(kind):
    tensors = inputs(kind, 1, 2, 64, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        tensors[1][0, 1, 40] = torch.nan
    out, _ = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend="cpp")
    assert out[:, 0].isfinite().all() and out[:, 1, :32].isfinite().all()
    assert out[:, 1, 48:].isnan().all()


@pytest.fixture
def fresh_library(tmp_path, monkeypatch):
    """No library yet, and an empty folder for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = build.library, build.unavailable_reason, scans.warn_once
    for function in found:
        function.cache_clear()
    yield tmp_path / "megatron-ttt"
    for function in found:
        function.cache_clear()


@needs_cpp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64's vector units")
@pytest.mark.parametrize("target", ["x86-64", "haswell"])
def test_narrower_vectors(target, fresh_library, monkeypatch):
    flags = [f"-march={target}" if x == "-march=native" else x for x in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)
    for kind in ("linear", "mlp"):
        for case in (CASES[2], MORE_CASES[0]):
            found = errors(kind, case)
            assert max(found.values()) < 1e-5, found
    assert len(list(fresh_library.iterdir())) == 1


@needs_cpp
def test_several_processes_build_it_at_once(fresh_library):
    command = "from megatron_ttt.mixers.ttt.cpp.build import library; library(); print('loaded')"
    processes = [
        subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate()[0].strip() for p in processes] == ["loaded"] * 3
    assert [path.suffix for path in fresh_library.iterdir()] == [".so"]
    built = os.stat(next(fresh_library.iterdir())).st_mtime_ns
    build.library()
    assert os.stat(next(fresh_library.iterdir())).st_mtime_ns == built  # found, not built again


def no_compiler(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))


def no_such_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "no-such-compiler")


def failing_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "false")


def no_folder(monkeypatch, folder):
    folder.write_text("a file where the folder would be")


@pytest.mark.parametrize(
    "trouble,said",
    [
        (no_compiler, r"no C\+\+ compiler: install g\+\+"),
        (no_such_compiler, "no-such-compiler"),
        (failing_compiler, "false cannot build it"),
        (no_folder, "File exists|Not a directory"),
    ],
)
def test_without_a_library_it_is_said_once(trouble, said, fresh_library, monkeypatch):
    trouble(monkeypatch, fresh_library)
    tensors = inputs("linear", 1, 1, 20, 16, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"C\\+\\+ cannot run this scan: .*({said})"):
        ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]), backend="cpp")
    expected = ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]), backend="torch")[0]
    with pytest.warns(UserWarning, match=rf"runs in PyTorch, not in C\+\+: .*({said})"):
        assert torch.equal(ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]))[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]))


@needs_cpp
def test_auto_takes_it_on_a_cpu():
    scan = scans.ScanProblem(LINEAR, 20, 8, torch.bfloat16, torch.float32, "cpu")
    assert scans.select_backend(scan) == "cpp"
    assert scans.select_backend(scan._replace(state_dtype=torch.float64)) == "torch"


def test_float64_is_left_to_pytorch():
    tensors = inputs("linear", 1, 1, 20, 16, 16)
    with pytest.raises(ValueError, match="computes in float32, not in float64"):
        ttt_scan(LINEAR, *tensors[:7], tuple(tensors[7:]), backend="cpp")
