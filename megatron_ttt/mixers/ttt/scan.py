"""The TTT inner loop as a pure function of tensors (arXiv 2407.04620, section 2).

    output, final_state = ttt_scan(LINEAR, q, k, v, lam, tau, gamma, beta, state)

`reference.py` reads like the maths and is what the other backends are tested against;
`torch_scan.py` is the fast form in plain PyTorch, `cpp/` a faster one for CPUs, and `triton/` runs
the kernels for GPUs.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ttt.mixers.ttt.cpp import scan as cpp
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.linear import LINEAR
from megatron_ttt.mixers.ttt.mlp import MLP
from megatron_ttt.mixers.ttt.reference import expand_state, reference_scan
from megatron_ttt.mixers.ttt.torch_scan import torch_scan

INNER_MODELS = {model.name: model for model in (LINEAR, MLP)}


def _triton_scan(*inputs):
    from megatron_ttt.mixers.ttt.triton.scan import triton_scan

    return triton_scan(*inputs)


BACKENDS = {
    "naive": reference_scan,
    "torch": torch_scan,
    "cpp": cpp.cpp_scan,
    "triton": _triton_scan,
}
BACKEND_LABELS = {"cpp": "C++", "triton": "the Triton kernels"}


def ttt_scan(
    model: InnerModel,
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
    """Run an inner model over sequences of any length, one gradient step per mini-batch.

    Sizes: B batch, H heads, L sequence, F head dim, M hidden width of TTT-MLP, K mini-batch.

    Args:
        model: LINEAR (TTT-Linear) or MLP (TTT-MLP).
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
        ValueError: unknown backend, a state that is not the model's, or inputs that a backend
            asked for by name cannot run.
    """
    if backend not in ("auto", *BACKENDS):
        choices = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown ttt_scan backend {backend!r}: choose one of {choices}")
    shapes = model.state_shapes(q_BHLF.shape[-1])
    if [W.shape[-2:] for W in state] != list(shapes.values()):
        expected = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        found = ", ".join(str(list(W.shape[-2:])) for W in state)
        raise ValueError(f"the state of TTT-{model.name} is {expected} for a head, not {found}")
    inputs = q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF
    state = expand_state(state, inputs)
    problem = describe(model, q_BHLF, tau_K, state)
    if backend == "auto":
        backend = select_backend(problem)
    else:
        reason = unsupported_reason(backend, problem)
        if reason is not None:
            raise ValueError(f"{BACKEND_LABELS[backend]} cannot run this scan: {reason}")
    with torch.autocast(q_BHLF.device.type, enabled=False):
        return BACKENDS[backend](model, *inputs, state)


class ScanProblem(NamedTuple):
    """What decides which backends can run a scan."""

    model: InnerModel
    head_dim: int
    mini_batch_size: int
    dtype: torch.dtype
    """Of q, k and v."""
    state_dtype: torch.dtype
    device: str
    """A device type, such as "cuda"."""


def describe(
    model: InnerModel, q_BHLF: Tensor, tau_K: Tensor, state: tuple[Tensor, ...]
) -> ScanProblem:
    """Return the problem that these inputs of a scan are."""
    device = q_BHLF.device.type
    return ScanProblem(model, q_BHLF.shape[-1], len(tau_K), q_BHLF.dtype, state[0].dtype, device)


def select_backend(problem: ScanProblem) -> str:
    """Return the fastest backend that can run a scan; warn once where it is not the usual one."""
    if problem.device == "cpu" and problem.state_dtype == torch.float64:
        return "torch"  # the usual one for float64
    backend = "triton" if problem.device == "cuda" else "cpp"
    reason = unsupported_reason(backend, problem)
    if reason is None:
        return backend
    warn_once(f"ttt_scan runs in PyTorch, not in {BACKEND_LABELS[backend]}: {reason}")
    return "torch"


def unsupported_reason(backend: str, problem: ScanProblem) -> str | None:
    """Return why a backend cannot run a scan, None if it can."""
    if backend == "cpp":
        return cpp.unsupported_reason(problem.state_dtype, problem.device)
    if backend == "triton":
        try:
            from megatron_ttt.mixers.ttt.triton import scan as triton
        except ModuleNotFoundError:
            return "triton is not installed"
        return triton.unsupported_reason(*problem)
    return None


@cache
def warn_once(message: str) -> None:
    """Warn of the same thing once in a process."""
    warnings.warn(message, stacklevel=4)
