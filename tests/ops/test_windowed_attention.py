"""Windowed and grouped causal attention against the formula in float64, and its memory."""

import json
import sys

import pytest
import torch
from harness import relative, run
from torch.autograd.graph import saved_tensors_hooks

from megatron_ttt.mixers.attention.core import CausalAttention
from megatron_ttt.ops.windowed_attention import windowed_attention, windowed_attention_reference


def inputs(B=2, H=4, G=2, L=10, F=8, dtype=torch.float64):
    """q, k, v: other numbers in every run."""
    torch.seed()
    return [torch.randn(B, n, L, F, dtype=dtype, requires_grad=True) for n in (H, G, G)]


def with_gradients(form, tensors, window, upstream=None):
    """The output and the gradients of the three inputs."""
    out = form(*tensors, window)
    upstream = torch.randn_like(out) if upstream is None else upstream.to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, upstream)], upstream


def check(tensors, window, bound=1e-12):
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected, upstream = with_gradients(windowed_attention_reference, exact, window)
    measured, _ = with_gradients(windowed_attention, tensors, window, upstream)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), measured, expected):
        assert ours.shape == theirs.shape and ours.dtype == tensors[0].dtype
        # A window of 1 leaves no gradient to queries and keys: then the norm itself counts.
        assert (ours.double() - theirs).norm() < bound * max(theirs.norm(), 1), name


@pytest.mark.parametrize(
    "L, window",
    [
        (50, None),
        (1, None),
        (1, 1),
        (50, 1),  # each token alone
        (50, 2),
        (300, 1),
        (300, 2),
        (50, 49),
        (50, 50),
        (50, 51),
        (7, 10**9),
        (23, 5),  # no whole block after the window
        (5 + 64, 5),  # exactly one block
        (5 + 3 * 64, 5),
        (5 + 3 * 64 + 1, 5),
        (5 + 3 * 64 + 63, 5),
        (301 + 3 * 76 + 29, 301),  # blocks of a quarter of the window, rounded up
        (2 * 320, 320),
    ],
)
def test_equals_the_formula(L, window):
    check(inputs(L=L), window)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("H, G", [(1, 1), (4, 4), (6, 3), (6, 2), (4, 1)])
def test_grouped_heads(H, G, window):
    """Against the formula, and against the operation with keys and values repeated by hand."""
    q, k, v = tensors = inputs(H=H, G=G, L=200)
    check(tensors, window)
    group = [h // (H // G) for h in range(H)]
    repeated = windowed_attention(q, k[:, group], v[:, group], window)
    assert torch.equal(windowed_attention(q, k, v, window), repeated)


@pytest.mark.parametrize("window", [None, 5])
def test_gradcheck(window):
    tensors = inputs(B=1, H=2, G=1, L=5 + 64 + 2, F=2)
    assert torch.autograd.gradcheck(
        lambda *x: windowed_attention(*x, window), tensors, fast_mode=True
    )


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 40])
def test_other_precisions(window, dtype, bound):
    check(inputs(L=300, F=16, dtype=dtype), window, bound)


@pytest.mark.parametrize("window", [None, 1, 6, 320])
def test_first_token_sees_itself(window):
    q, k, v = inputs(L=700)
    first = windowed_attention(q, k, v, window)[:, :, 0]
    assert relative(first, v[:, [0, 0, 1, 1], 0]) < 1e-14


@pytest.mark.parametrize("window", [None, 1, 6, 300])
@torch.no_grad()
def test_no_token_leaks(window):
    """A changed key and value change all tokens that see it, and not a bit of the others."""
    L = 700
    q, k, v = inputs(B=1, L=L)
    before = windowed_attention(q, k, v, window)
    borders = (0, 1, 5, 6, 69, 70, 299, 300, 374, 375, 376, 600, 674, 675, L - 1)
    for j in borders:
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, j] += 3
        changed_v[:, :, j] += 100
        after = windowed_attention(q, changed_k, changed_v, window)
        changed = (after != before).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
        assert changed == list(range(j, L if window is None else min(j + window, L))), j


def saved_bytes(L, window, dtype):
    """What the operation keeps for the backward pass, shared memory counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        tensors = inputs(B=1, L=L, F=16, dtype=dtype)
        out = windowed_attention(*tensors, window)
    out.sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", [None, 64, 100])
def test_memory_of_a_token_is_flat(window, dtype):
    """And small: q, the repeated k and v, the output of the blocks; a row's sum of each head."""
    L = 1024
    short, long = (saved_bytes(n, window, dtype) for n in (L, 4 * L))
    assert 3.5 < long / short < 4.1
    assert (long - short) / (3 * L) < 1.2 * 4 * (4 * 16 * dtype.itemsize + 8)


@pytest.mark.parametrize("window", [None, 20])
def test_core_attention(window):
    """megatron-core's layout, with strides as a packed projection leaves them."""
    q, k, v = (x.detach() for x in inputs(B=3, L=100))
    query = q.permute(2, 0, 1, 3).contiguous()
    packed = torch.cat([x.permute(2, 0, 1, 3) for x in (k, v)], dim=-1)
    key, value = packed.chunk(2, dim=-1)
    out = CausalAttention(None, window)(query, key, value, None, attn_mask_type=None)
    expected = windowed_attention_reference(q, k, v, window).permute(2, 0, 1, 3).flatten(2)
    assert relative(out, expected) < 1e-12


def test_packed_sequences_are_refused():
    q, k, v = (x.permute(2, 0, 1, 3) for x in inputs())
    with pytest.raises(ValueError, match="packed sequences are not supported"):
        CausalAttention(None)(q, k, v, packed_seq_params=object())


def test_wrong_arguments_are_refused():
    q, k, v = inputs(H=4, G=3)
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        windowed_attention(q, k, v, 2)
    with pytest.raises(ValueError, match="window=0 is too small"):
        windowed_attention(q, q, q, 0)


@pytest.mark.speed
def test_time_of_a_token_is_flat(tmp_path):
    """The benchmark runs; a token of four times the length would take full attention four times."""
    output = tmp_path / "attention.json"
    run([sys.executable, "benchmarks/windowed_attention.py", "--quick", "--output", output])
    short, long = json.loads(output.read_text())["cases"]
    assert long["length"] == 4 * short["length"] and long["window"] == short["window"]
    assert long["us_per_token"] < 1.5 * short["us_per_token"]
