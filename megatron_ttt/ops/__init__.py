"""The TTT inner loop as a pure function of tensors (arXiv 2407.04620, section 2).

    output, final_state = ttt_scan(q, k, v, lam, tau, gamma, beta, state)

`naive.py` reads like the maths and is the oracle; `scan.py` is the fast form in plain PyTorch;
`cpp/` is a faster one for CPUs and `triton/` holds the kernels for GPUs. What stands round the scan
is in `conv_rotate.py`, `rope.py` and `wide_norm.py`; `fused.py` says where it runs in kernels.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ttt.ops.cpp.scan import cpp_scan, why_not_cpp
from megatron_ttt.ops.naive import naive_scan, widened
from megatron_ttt.ops.scan import torch_scan


def triton_scan(*inputs):
    """As `ttt_scan`, for inputs that `why_not` has nothing against."""
    from megatron_ttt.ops.triton.scan import triton_scan

    return triton_scan(*inputs)


WHERE = {"cpp": "C++", "triton": "the Triton kernels"}
BACKENDS = {"naive": naive_scan, "torch": torch_scan, "cpp": cpp_scan, "triton": triton_scan}


def ttt_scan(
    q_BHLF: Tensor,
    k_BHLF: Tensor,
    v_BHLF: Tensor,
    lam_BHL: Tensor,
    tau_K: Tensor,
    gamma_HF: Tensor,
    beta_HF: Tensor,
    state: tuple[Tensor, ...],
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run TTT-Linear or TTT-MLP over sequences of any length, one gradient step per mini-batch.

    Sizes: B batch, H heads, L sequence, F head dim, M hidden width of TTT-MLP, K mini-batch.

    Args:
        q_BHLF, k_BHLF, v_BHLF: queries, keys (both after RoPE) and values.
        lam_BHL: the keys' share of the inner learning rate, base_lr * sigmoid(...) / F.
        tau_K: the positions' share, max(1/i + delta_i, 0); its length is the mini-batch size.
        gamma_HF, beta_HF: weight and bias of the inner LayerNorm.
        state: what the inner model starts from. TTT-Linear: W [F, F] and b [1, F]; TTT-MLP: W1
            [F, M], b1 [1, M], W2 [M, F] and b2 [1, F]. Each has leading dimensions [H] (shared by
            the batch) or [B, H].
        backend: "naive" (autograd through a loop), "torch" (its own backward), "cpp" (a CPU and a
            C++ compiler, no float64), "triton" (kernels: head_dim 16 to 128, mini-batches of 16, 32
            or 64, no float64) or "auto": "triton" on CUDA and "cpp" elsewhere, or "torch" where
            they cannot, which it says once.

    Returns:
        The outputs [B, H, L, F], q + LN(Zbar) with its affine part, in q's dtype, and the state
        after the last full mini-batch, per batch and head. A ragged last mini-batch is answered
        but leaves the state alone.

    State, statistics and arithmetic are in float32, or in float64 if any argument is; gradients
    come back in their argument's dtype. Only "naive" can be differentiated twice. "triton" rounds
    the operands of products to bfloat16 if q, k and v are bfloat16.

    Raises:
        ValueError: unknown backend, a state of neither two nor four tensors, or inputs that a
            backend asked for by name cannot run.
    """
    if backend not in ("auto", *BACKENDS):
        choices = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown ttt_scan backend {backend!r}: choose one of {choices}")
    if len(state) not in (2, 4):
        raise ValueError(f"state has {len(state)} tensors: give (W, b) or (W1, b1, W2, b2)")
    inputs = q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF
    state = widened(state, inputs)
    scan = facts(q_BHLF, tau_K, state)
    if backend == "auto":
        backend = choose(scan)
    else:
        reason = why_not(backend, scan)
        if reason is not None:
            raise ValueError(f"{WHERE[backend]} cannot run this scan: {reason}")
    with torch.autocast(q_BHLF.device.type, enabled=False):
        return BACKENDS[backend](*inputs, state)


class Facts(NamedTuple):
    """Of a scan, what decides whether the kernels can run it. kind: "linear" or "mlp"; dtype: of q,
    k and v; device: its kind, such as "cuda"."""

    kind: str
    head_dim: int
    mini_batch_size: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: str


def facts(q_BHLF: Tensor, tau_K: Tensor, state: tuple[Tensor, ...]) -> Facts:
    """Of a scan's inputs."""
    kind, q = "linear" if len(state) == 2 else "mlp", q_BHLF
    return Facts(kind, q.shape[-1], len(tau_K), q.dtype, state[0].dtype, q.device.type)


def choose(scan: Facts) -> str:
    """The fastest backend for a scan."""
    if scan.device == "cpu" and scan.state_dtype == torch.float64:
        return "torch"  # what float64 is for: no word about it
    backend = "triton" if scan.device == "cuda" else "cpp"
    reason = why_not(backend, scan)
    if reason is None:
        return backend
    say_once(f"ttt_scan runs in PyTorch, not in {WHERE[backend]}: {reason}")
    return "torch"


def why_not(backend: str, scan: Facts) -> str | None:
    """What keeps a backend from a scan; None if nothing does."""
    if backend == "cpp":
        return why_not_cpp(scan.state_dtype, scan.device)
    if backend == "triton":
        try:
            from megatron_ttt.ops.triton.scan import why_not
        except ModuleNotFoundError:
            return "triton is not installed"
        return why_not(*scan)
    return None


@cache
def say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
