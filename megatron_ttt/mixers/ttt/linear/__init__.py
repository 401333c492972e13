"""TTT-Linear: the inner model is x W + b, with W [F, F] and b [1, F]."""

from __future__ import annotations

from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.linear.reference import mini_batch, predict
from megatron_ttt.mixers.ttt.linear.workspace import LinearWorkspace


def _state_shapes(head_dim: int) -> dict[str, tuple[int, int]]:
    return {"W1": (head_dim, head_dim), "b1": (1, head_dim)}


def _load_kernels():
    from megatron_ttt.mixers.ttt.linear import kernels

    return kernels.forward, kernels.backward


LINEAR = InnerModel(
    "linear", _state_shapes, mini_batch, predict, (6, 4), LinearWorkspace, _load_kernels
)
