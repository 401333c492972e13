"""The TTT scan in C++ behind torch.autograd: `scan.cpp` on as many threads as torch has.

Sizes as in `scan.cpp`.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.mixers.ttt.cpp.build import library, unavailable_reason
from megatron_ttt.mixers.ttt.inner_model import CHECKPOINT_INTERVAL, InnerModel

INPUTS = "q", "k", "v", "lam", "tau", "gamma", "beta"
STATE = "W1", "b1", "W2", "b2"
STATE_OF_MODEL = {"linear": STATE[2:], "mlp": STATE}
"""What scan.cpp calls the tensors of an inner model's state: TTT-Linear's are a last layer."""


def final_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}_final" for name in names)


def gradients_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"d{name}" for name in names)


class Tokens(ctypes.Structure):
    """A tensor [B, H, L, ...] of any strides but for the last dimension's, which is 1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "token")),
    )


class Arguments(ctypes.Structure):
    """`struct Arguments` of scan.cpp, where their shapes stand."""

    SIZES = "heads", "length", "features", "hidden", "mini_batch", "group"
    TOKENS = (*INPUTS[:4], "output", "d_output", *gradients_of(INPUTS[:4]))
    LISTS = ("kept",)
    TENSORS = (
        *(*INPUTS[4:], *gradients_of(INPUTS[4:]), *STATE, *final_names(STATE)),
        *(*gradients_of(STATE), *gradients_of(final_names(STATE))),
    )
    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in LISTS),
        *((name, ctypes.c_void_p) for name in TENSORS),
    )

    def take(self, names: tuple[str, ...], tensors) -> None:
        """Point to tensors, or to a list of them, which the caller keeps alive."""
        for name, x in zip(names, tensors):
            if name in self.LISTS:
                setattr(self, name, (ctypes.c_void_p * len(x))(*(y.data_ptr() for y in x)))
            elif name in self.TOKENS:
                setattr(self, name, Tokens(x.data_ptr(), *x.stride()[:3]))
            else:
                setattr(self, name, x.data_ptr())


def unsupported_reason(state_dtype: torch.dtype, device: str) -> str | None:
    """Return why the C++ scan cannot run, None if it can."""
    if device != "cpu":
        return f"it runs on a CPU, not on {device}"
    if state_dtype != torch.float32:
        return f"it computes in float32, not in {str(state_dtype).removeprefix('torch.')}"
    return unavailable_reason()


def cpp_scan(model: InnerModel, q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, state):
    """As `ttt_scan`, with the state [B, H, ...] in float32."""
    output, *final_state = Scan.apply(
        STATE_OF_MODEL[model.name],
        *(q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF),
        *state,
    )
    return output, tuple(final_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, names, *inputs):
        q, state = inputs[0], [W.contiguous() for W in inputs[7:]]
        wide = [for_cpp(x) for x in inputs[:7]]
        given = arguments(wide, names, state)
        output, final_state = torch.empty_like(wide[0]), [torch.empty_like(W) for W in state]

        # One tensor a group, so that malloc finds them in its heap, where memory is mapped already.
        heads, mini_batches = q.shape[0] * q.shape[1], -(-q.shape[2] // given.mini_batch)
        size, groups = (
            library().kept_size(ctypes.byref(given)),
            -(-mini_batches // CHECKPOINT_INTERVAL),
        )
        kept = [output.new_empty(size) for _ in range(heads * groups)]

        given.take(("output", "kept"), (output, kept))
        given.take(names, state)
        given.take(final_names(names), final_state)
        run(library().forward, given, heads)
        ctx.save_for_backward(*inputs, *kept)
        ctx.inputs, ctx.names = len(inputs), names
        return output.to(q.dtype), *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final_state):
        saved = ctx.saved_tensors  # once: under checkpointing it recomputes
        inputs, state, kept = saved[:7], saved[7 : ctx.inputs], saved[ctx.inputs :]
        B, H = inputs[0].shape[:2]
        wide, state = [for_cpp(x) for x in inputs], [W.contiguous() for W in state]
        given = arguments(wide, ctx.names, state)
        d_wide = [for_cpp(d_output), *(d.contiguous() for d in d_final_state)]
        d_tokens = [torch.empty_like(x) for x in wide[:4]]
        # tau, gamma and beta get theirs from each sequence, and tau from each head.
        d_shared = [x.new_empty(B, H, x.shape[-1]) for x in wide[4:]]
        d_state = [torch.empty_like(W) for W in state]

        given.take(("kept", "d_output", *gradients_of(final_names(ctx.names))), [kept, *d_wide])
        given.take(gradients_of(INPUTS), d_tokens + d_shared)
        given.take(ctx.names, state)
        given.take(gradients_of(ctx.names), d_state)
        run(library().backward, given, B * H)
        dtau, dgamma, dbeta = d_shared
        d_inputs = *d_tokens, dtau.sum((0, 1)), dgamma.sum(0), dbeta.sum(0)
        return None, *(d.to(x.dtype) for d, x in zip(d_inputs, inputs)), *d_state


def for_cpp(x: Tensor) -> Tensor:
    """In float32, with neighbours in the last dimension."""
    x = x.float()
    return x if x.dim() == 4 and x.stride(-1) == 1 else x.contiguous()


def arguments(wide: list[Tensor], names: tuple[str, ...], state: list[Tensor]) -> Arguments:
    """Sizes and inputs; the caller keeps `wide` alive."""
    M = dict(zip(names, state))["W1"].shape[-1] if "W1" in names else 0
    (_, H, L, F), K = wide[0].shape, len(wide[4])
    given = Arguments(H, L, F, M, K, CHECKPOINT_INTERVAL)
    given.take(INPUTS, wide)
    return given


def run(function, given: Arguments, heads: int) -> None:
    """On torch's threads: those that spin after an operation of its go on with this."""
    threads = min(torch.get_num_threads(), heads)
    function(ctypes.byref(given), ctypes.c_int64(heads), ctypes.c_int(threads))
