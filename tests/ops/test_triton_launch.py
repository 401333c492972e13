"""Launches that go through all of Triton but the device: its binder, autotuner, cache and compiler.

A driver without a device stands in for one: what it is to launch has been compiled for sm_90, and
is counted.
"""

import os
from collections import Counter

import pytest
import torch
from test_scan import inputs

triton = pytest.importorskip("triton")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("nothing would be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from megatron_ttt.mixers.ttt.linear import kernels as linear  # noqa: E402
from megatron_ttt.mixers.ttt.mlp import backward_kernel, forward_kernel  # noqa: E402
from megatron_ttt.mixers.ttt.scan import INNER_MODELS  # noqa: E402
from megatron_ttt.mixers.ttt.triton.scan import triton_scan  # noqa: E402
from megatron_ttt.ops.triton import (  # noqa: E402
    conv_rope,
    layernorm_gate,
    rmsnorm_conv,
)

SCAN = {kind: (f"{kind}_forward", f"{kind}_backward") for kind in ("linear", "mlp")}


class NoDevice:
    """What Triton asks of a driver."""

    def __init__(self):
        self.launched, self.compiled, self.timed, self.utils = Counter(), Counter(), 0, self

    def launcher_cls(self, source, metadata):
        def launch(*grid_stream_and_arguments):
            self.launched[source.fn.__name__] += 1

        return launch

    def load_binary(self, name, binary, shared, device):
        self.compiled[name] += 1
        return name, None, 255, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self):
        def seconds(launch, quantiles):
            launch()
            self.timed += 1
            return [float(self.timed)] * len(quantiles)

        return seconds


MODULES = (linear, forward_kernel, backward_kernel, conv_rope, rmsnorm_conv, layernorm_gate)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The driver; no kernel is compiled or timed yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoDevice())
    forget()
    yield driver.active
    forget()


def forget() -> None:
    """Let no kernel be compiled, nor any choice made."""
    for kernel in [kernel for module in MODULES for kernel in vars(module).values()]:
        if isinstance(kernel, Autotuner):
            kernel.cache.clear()
            kernel = kernel.fn
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()


def scan(kind: str, length: int) -> None:
    """Forward and backward of a scan in bfloat16, then a forward that keeps nothing."""
    tensors = inputs(kind, 2, 3, length, 16, 16, dtype=torch.float32)
    tensors = [
        (x.detach().bfloat16() if i < 3 else x.detach()).requires_grad_()
        for i, x in enumerate(tensors)
    ]
    model = INNER_MODELS[kind]
    state = tuple(W.expand(2, 3, *W.shape[-2:]) for W in tensors[7:])
    out, final = triton_scan(model, *tensors[:7], state)
    results = [out, *final]
    torch.autograd.grad(results, tensors, [torch.ones_like(x) for x in results])
    with torch.no_grad():
        triton_scan(model, *tensors[:7], state)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.compile)])
def test_one_compilation_serves_every_length(device, deterministic, kind):
    forward, backward = SCAN[kind]
    for length in (1, 16, 37, 160):
        scan(kind, length)
    assert device.launched == {forward: 2 * 4, backward: 4} and device.timed == 0
    assert device.compiled == {forward: 2, backward: 1}, "one that keeps states, one that does not"


@pytest.mark.compile
def test_choices_are_timed_once_and_remembered_on_disk(device):
    choices = len(linear.CHOICES)
    scan("linear", 40)
    assert device.timed == 2 * choices, "a forward that keeps nothing goes by the other's"
    assert device.launched == {"linear_forward": choices + 2, "linear_backward": choices + 1}
    scan("linear", 90)
    assert device.timed == 2 * choices
    for kernel in (linear.linear_forward, linear.linear_backward):
        kernel.cache.clear()  # as in another process
    scan("linear", 40)
    assert device.timed == 2 * choices


@pytest.mark.compile
@pytest.mark.parametrize("ranks", [1, 2])
def test_round_the_scan_one_compilation_serves_every_length(device, monkeypatch, ranks):
    monkeypatch.setattr(layernorm_gate, "row_statistics", lambda var, mean, *_: (mean, var))
    monkeypatch.setattr(layernorm_gate.dist, "all_reduce", lambda *_, **__: None)

    class Group:
        def size(self):
            return ranks

    D, F, B = 48, 16, 2
    for length in (1, 16, 37, 160):
        x, gate, v = torch.randn(length, B, 3 * D).bfloat16().requires_grad_().chunk(3, -1)
        weight, bias = torch.randn(D, 1, 4).bfloat16(), torch.randn(D).bfloat16()
        outputs = [
            *conv_rope.conv_rope(x, [(weight, bias)] * 2, *torch.randn(2, 16, F // 2)),
            layernorm_gate.layernorm_gate(v, gate, bias, bias, 1e-6, Group()),
            rmsnorm_conv.rmsnorm_conv(v.contiguous(), bias, 1e-6, weight, bias),
        ]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert set(device.launched.values()) == {4}
    assert set(device.compiled.values()) == {1}
