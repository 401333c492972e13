"""Measure the Triton kernels against the naive form in float64, and print the figures as JSON.

    TRITON_INTERPRET=1 python tests/ops/triton_cases.py linear groups "head_dim 96"
    python tests/ops/triton_cases.py mlp "head_dim 64"        # compiled, on a GPU

A process of its own: Triton decides on import whether its kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from harness import relative
from test_scan import NAMES, inputs

from megatron_ttt.mixers.ttt.reference import reference_scan
from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan
from megatron_ttt.mixers.ttt.triton import common
from megatron_ttt.mixers.ttt.triton.scan import triton_scan

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
INTERVAL = 2
SHORT = "a part of the gradients"
CASES = {  # B, H, L, F, K, a state per sequence, dtype of q, k and v, and what gamma is times
    "groups": (2, 2, 16 * 5, 16, 16, False, torch.float32),
    "ragged, a state per sequence": (2, 1, 16 * 4 + 5, 16, 16, True, torch.float32),
    "shorter than a mini-batch": (1, 2, 9, 16, 16, False, torch.float32),
    "head_dim 64": (1, 1, 16 * 3, 64, 16, False, torch.float32),
    "head_dim 96": (1, 1, 16 * 2 + 3, 96, 16, False, torch.float32),
    "head_dim 64, mini-batches of 64": (1, 1, 64 + 1, 64, 64, False, torch.float32),
    "head_dim 20, mini-batches of 32": (1, 1, 32 * 3, 20, 32, False, torch.float32),
    "bf16 groups, a state per sequence": (2, 1, 16 * 2 + 5, 64, 16, True, torch.bfloat16),
    "bf16 head_dim 128, mini-batches of 64": (1, 1, 64 + 1, 128, 64, False, torch.bfloat16),
    "a state that grows": (1, 2, 16 * 4 + 5, 16, 16, True, torch.float32, 1000),
}
# Compiled, float32 products are unrolled into single multiplications: minutes for a wide tile. The
# widest of bfloat16 takes one, and is compiled in test_triton_compile.py.
INTERPRETED_ONLY = (
    "head_dim 64, mini-batches of 64",
    "head_dim 96",
    "bf16 head_dim 128, mini-batches of 64",
)


def case(kind: str, *arguments) -> dict:
    """The relative errors of outputs and gradients, and whether a second run gave other bits.

    In bf16 of three draws together: of tau's gradient, a few sums of terms that cancel, one draw
    may leave little for the error to be relative to.
    """
    torch.manual_seed(0)
    draws = [draw(kind, *arguments) for _ in range(3 if torch.bfloat16 in arguments else 1)]

    def together(results: list[dict]) -> dict:
        return {n: torch.cat([r[n].cpu().double().flatten() for r in results]) for n in results[0]}

    expected = together([draw["expected"] for draw in draws])
    results = together([draw["results"] for draw in draws])
    return {
        "errors": {name: relative(results[name], expected[name]) for name in expected},
        "repeats": all(draw["repeats"] for draw in draws),
        "same without gradients": all(draw["same without gradients"] for draw in draws),
    }


def draw(kind: str, B, H, L, F, K, per_batch, dtype, times_gamma=1) -> dict:
    """Outputs and gradients for fresh random inputs, the kernels' and the naive form's."""
    tensors = inputs(kind, B, H, L, F, K, dtype=torch.float32, per_batch=per_batch)
    tensors[5] = tensors[5].detach() * times_gamma
    ours = [
        as_the_mixer_has_them(x, dtype) if i < 3 else on_device(x, torch.float32)
        for i, x in enumerate(tensors)
    ]
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]

    def expand(state):
        return tuple(W.expand(B, H, *W.shape[-2:]) for W in state)

    out, final = reference_scan(INNER_MODELS[kind], *exact[:7], expand(exact[7:]))
    upstream = [torch.randn_like(result) for result in (out, *final)]
    upstream[0] = upstream[0].to(dtype).double()
    expected = dict(zip(names("", final), (out, *final)))
    expected |= dict(zip(names("d ", final), torch.autograd.grad([out, *final], exact, upstream)))

    def measure():
        out, final = triton_scan(INNER_MODELS[kind], *ours[:7], expand(ours[7:]), interval=INTERVAL)
        given = [u.to(DEVICE, r.dtype) for u, r in zip(upstream, (out, *final))]
        gradients = torch.autograd.grad([out, *final], ours, given)
        assert out.dtype == dtype and [g.dtype for g in gradients] == [x.dtype for x in ours]
        return [out, *final, *gradients]

    first, second = measure(), measure()
    with torch.no_grad():
        silent = triton_scan(INNER_MODELS[kind], *ours[:7], expand(ours[7:]), interval=INTERVAL)
    return {
        "expected": expected,
        "results": dict(zip(expected, first)),
        "repeats": all(map(torch.equal, first, second)),
        "same without gradients": torch.equal(silent[0], first[0]),
    }


def names(prefix: str, final) -> list[str]:
    states = [f"{prefix}state {i}" for i in range(len(final))]
    return [f"{prefix}{name}" for name in NAMES] + states if prefix else ["out", *states]


def on_device(x, dtype):
    return x.detach().to(DEVICE, dtype).requires_grad_()


def as_the_mixer_has_them(x_BHLF, dtype):
    """The same numbers, token by token in memory."""
    x_LBHF = x_BHLF.detach().permute(2, 0, 1, 3).contiguous()
    return on_device(x_LBHF.permute(1, 2, 0, 3), dtype)


def poisoned():
    """Fill with NaN whatever the launchers allocate."""
    new, empty_like = common.new, torch.empty_like

    def nans(x):
        return x.fill_(float("nan"))

    def poisoned_new(like, *shape):
        return nans(new(like, *shape))

    from megatron_ttt.mixers.ttt.linear import kernels
    from megatron_ttt.mixers.ttt.mlp import backward_kernel, forward_kernel

    kernels.new = forward_kernel.new = backward_kernel.new = poisoned_new
    torch.empty_like = lambda x: nans(empty_like(x))
    torch.Tensor.new_empty = lambda x, *args, **kwargs: nans(x.new_zeros(*args, **kwargs))


def short_of_gradients(kind: str) -> dict:
    """Through the public entry, of the outputs alone and for some inputs, under checkpointing."""
    tensors = [x.to(DEVICE) for x in inputs(kind, 1, 2, 40, 16, 16, dtype=torch.float32)]
    tensors = [x.detach().requires_grad_(i not in (0, 4, 6)) for i, x in enumerate(tensors)]
    wanted = [x for x in tensors if x.requires_grad]
    upstream = torch.randn(1, 2, 40, 16, device=DEVICE)

    def outputs(*tensors, backend):
        return ttt_scan(INNER_MODELS[kind], *tensors[:7], tuple(tensors[7:]), backend=backend)[0]

    expected = torch.autograd.grad(outputs(*tensors, backend="torch"), wanted, upstream)
    out = torch.utils.checkpoint.checkpoint(
        outputs, *tensors, backend="triton", use_reentrant=False
    )
    gradients = torch.autograd.grad(out, wanted, upstream)
    return {"errors": {str(i): relative(a, b) for i, (a, b) in enumerate(zip(gradients, expected))}}


if __name__ == "__main__":
    kind, *wanted = sys.argv[1:]
    results = {SHORT: short_of_gradients(kind)} if SHORT in wanted else {}
    poisoned()
    for name in CASES:
        if name in wanted and not (DEVICE == "cuda" and name in INTERPRETED_ONLY):
            try:
                results[name] = case(kind, *CASES[name])
            except Exception as error:  # of one case; the others say more
                results[name] = {"failed": f"{type(error).__name__}: {error}"}
            # As it comes: of a process that is ended early this is all there will be.
            print(f"{kind}, {name}: {results[name]}", file=sys.stderr, flush=True)
    print(json.dumps(results))
