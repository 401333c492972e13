"""The fast scan against the naive one, on fresh random inputs; every gradient."""

import pytest
import torch
from harness import relative

from megatron_ttt.mixers.ttt.cpp.build import unavailable_reason
from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan

needs_cpp = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
FAST = "torch", pytest.param("cpp", marks=needs_cpp)
NAMES = ("q", "k", "v", "lam", "tau", "gamma", "beta")


def inputs(kind, B, H, L, F, K, *, dtype=torch.float64, per_batch=False, seed=None):
    """Random inputs that all require gradients."""
    if seed is not None:
        torch.manual_seed(seed)

    def around(mean, std, *shape):
        return (mean + std * torch.randn(shape, dtype=torch.float64)).to(dtype)

    tensors = [around(0, 1, B, H, L, F) for _ in range(3)]
    tensors.append(torch.rand(B, H, L, dtype=torch.float64).to(dtype) / F)
    tensors.append((1 / torch.arange(1, K + 1) + around(0, 0.02, K)).clamp_min(0).to(dtype))
    tensors += [around(1, 0.2, H, F), around(0, 0.2, H, F)]
    lead = (B, H) if per_batch else (H,)
    shapes = INNER_MODELS[kind].state_shapes(F).values()
    tensors += [around(0, 0.3 / r**0.5 if r > 1 else 0.1, *lead, r, c) for r, c in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def run(kind, tensors, backend, upstream=None):
    """Outputs, final state, and the gradients of everything."""
    out, final = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend)
    results = [out, *final]
    if upstream is None:
        upstream = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, tensors, upstream)
    return results, gradients, upstream


CASES = [  # B, H, L, F, K, a state per sequence
    (2, 2, 96, 16, 16, False),
    (1, 2, 16 * 37 + 5, 16, 16, False),
    (2, 1, 45, 64, 16, True),
    (1, 2, 70, 96, 32, False),
    (1, 1, 40, 128, 16, True),
    (2, 3, 43, 16, 4, True),
    (1, 2, 9, 16, 16, False),
    (2, 2, 1, 16, 16, True),
]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("B,H,L,F,K,per_batch", CASES)
def test_fast_scan_is_the_naive_one(kind, B, H, L, F, K, per_batch):
    tensors = inputs(kind, B, H, L, F, K, per_batch=per_batch)
    results, gradients, upstream = run(kind, tensors, "naive")
    fast, fast_gradients, _ = run(kind, tensors, "torch", upstream)
    for ours, theirs in zip(fast, results):
        assert relative(ours, theirs) < 1e-12
    names = [*NAMES, *(f"state {i}" for i in range(len(tensors) - 7))]
    for name, ours, theirs in zip(names, fast_gradients, gradients):
        assert relative(ours, theirs) < 1e-12, name


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_naive_scan_has_the_gradients_of_what_it_computes(kind):
    tensors = inputs(kind, 1, 1, 9, 4, 4, seed=0)

    def function(*tensors):
        out, final = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend="naive")
        return out, *final

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_goes_on_from_its_final_state(kind, backend):
    tensors = inputs(kind, 2, 2, 85, 16, 16)
    whole, final = ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend)
    parts, state = [], tuple(tensors[7:])
    for stretch in (slice(0, 32), slice(32, 80), slice(80, 85)):
        tokens = [x[:, :, stretch] for x in tensors[:4]]
        out, state = ttt_scan(INNER_MODELS[kind], *tokens, *tensors[4:7], state, backend=backend)
        parts.append(out)
    assert relative(torch.cat(parts, 2), whole) < 1e-13
    for ours, theirs in zip(state, final):
        assert relative(ours, theirs) < 1e-13


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", FAST)
def test_bf16_tokens_are_scanned_in_float32(kind, backend):
    tensors = inputs(kind, 1, 2, 50, 16, 16, dtype=torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in tensors[:3]] + tensors[3:]
    wide = [x.detach().float().requires_grad_() for x in narrow[:3]] + tensors[3:]
    out, final = ttt_scan(INNER_MODELS[kind], *narrow[:7], tuple(narrow[7:]), backend=backend)
    wide_out, wide_final = ttt_scan(INNER_MODELS[kind], *wide[:7], tuple(wide[7:]), backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide_out.bfloat16())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(final, wide_final))
    gradients = torch.autograd.grad(out.float().sum(), narrow)
    assert [g.dtype for g in gradients] == [x.dtype for x in narrow]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_that_are_not_asked_for(kind, backend):
    """Through the outputs alone, for some of the inputs, inside activation checkpointing."""
    dtype, bound = (torch.float32, 1e-5) if backend == "cpp" else (torch.float64, 1e-12)
    tensors = inputs(kind, 1, 2, 50, 16, 16, dtype=dtype)
    for index in (0, 4, 6):
        tensors[index] = tensors[index].detach()
    wanted = [x for x in tensors if x.requires_grad]

    def outputs(*tensors, backend):
        return ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend)[0]

    upstream = torch.randn(1, 2, 50, 16, dtype=dtype)
    naive = torch.autograd.grad(outputs(*tensors, backend="naive"), wanted, upstream)
    out = torch.utils.checkpoint.checkpoint(outputs, *tensors, backend=backend, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(out, wanted, upstream), naive):
        assert relative(ours, theirs) < bound


def test_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="naive, torch"):
        ttt_scan(
            INNER_MODELS["linear"], *inputs("linear", 1, 1, 16, 16, 16)[:7], (), backend="fast"
        )


def test_refuses_the_state_of_another_model():
    tensors = inputs("mlp", 1, 1, 16, 16, 16)
    with pytest.raises(ValueError, match=r"the state of TTT-linear is W1 \[16, 16\], b1 \[1, 16\]"):
        ttt_scan(INNER_MODELS["linear"], *tensors[:7], tuple(tensors[7:]))
