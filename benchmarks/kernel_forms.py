"""What `kernels.py` compares: forms of what stands round the scan, other libraries' scans."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from megatron_ttt.ops.conv_rope import causal_conv, reference_conv_rope
from megatron_ttt.ops.rope import mini_batch_angles

MINI_BATCH = 16


def scan_flops(kind: str, D: int, f: int) -> int:
    """A forward's, per token; docs/mathematics.md, Cost."""
    return D * (6 * f + 4 * MINI_BATCH) if kind == "linear" else D * (56 * f + 20 * MINI_BATCH)


def around_forms(device: torch.device, L: int, B: int, heads: int, head_dim: int):
    """Name, tensors with gradients, forms, and how many times the tokens a kernel's forward and
    backward read and write (docs/kernels.md)."""
    from megatron_ttt.ops.triton.conv_rope import conv_rope
    from megatron_ttt.ops.triton.layernorm_gate import layernorm_gate
    from megatron_ttt.ops.triton.rmsnorm_conv import rmsnorm_conv

    D = heads * head_dim
    alone = SimpleNamespace(size=lambda: 1)

    def new(*shape):
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    x, gate, vector, other = new(L, B, D), new(L, B, D), new(D), new(D)
    taps = new(D, 1, 4), new(D), new(D, 1, 4), new(D)
    convolutions = [taps[:2], taps[2:]]
    angles = mini_batch_angles(MINI_BATCH, head_dim, 1e4, torch.float32, device)
    forms = {"triton": conv_rope, "torch": reference_conv_rope}
    yield (
        "convolutions and RoPE",
        [x, *taps],
        {name: lambda form=form: form(x, convolutions, *angles) for name, form in forms.items()},
        3 + 4,
    )
    yield (
        "pre-conv",
        [x, vector, *taps[:2]],
        {
            "triton": lambda: rmsnorm_conv(x, vector, 1e-6, *taps[:2]),
            "torch": lambda: (
                x
                + causal_conv(F.rms_norm(x.float(), (D,), eps=1e-6).to(x.dtype) * vector, *taps[:2])
            ),
        },
        3 + 5,
    )
    yield (
        "post-norm and gate",
        [x, gate, vector, other],
        {
            "triton": lambda: layernorm_gate(x, gate, vector, other, 1e-6, alone),
            "torch": lambda: (
                F.gelu(gate, approximate="tanh") * F.layer_norm(x, (D,), vector, other, 1e-6)
            ),
        },
        3 + 5,
    )


def other_forms(tensors) -> dict:
    """What other libraries have for tokens of this shape; each computes another function."""
    forms = {}
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])  # [B, L, H, F]
    lam_BLH, gamma, beta = tensors[3].transpose(1, 2), tensors[5], tensors[6]
    with suppress(ImportError):
        from fla.ops.ttt import chunk_ttt_linear

        eta = lam_BLH.unsqueeze(-1).to(q.dtype)
        forms["fla ttt_linear"] = lambda: chunk_ttt_linear(
            q, k, v, gamma, beta, eta, scale=1.0, chunk_size=MINI_BATCH
        )[0]
    with suppress(ImportError):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        forms["fla gated_delta_rule"] = lambda: chunk_gated_delta_rule(
            q, k, v, -lam_BLH, torch.sigmoid(lam_BLH).to(q.dtype), use_qk_l2norm_in_kernel=True
        )[0]
    with suppress(ImportError):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        forms["mamba2"] = lambda: mamba_chunk_scan_combined(
            v, lam_BLH, -torch.ones_like(gamma[:, 0]), k, q, chunk_size=256
        )
    return forms
