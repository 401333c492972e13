"""TTT-MLP: the inner model is gelu(x W1 + b1) W2 + b2, with M = 4 F hidden units.

W1 is [F, M], b1 [1, M], W2 [M, F] and b2 [1, F].
"""

from __future__ import annotations

from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.mlp.reference import mini_batch, predict
from megatron_ttt.mixers.ttt.mlp.workspace import MLPWorkspace

EXPANSION = 4
"""Hidden units over head_dim."""


def _state_shapes(head_dim: int) -> dict[str, tuple[int, int]]:
    hidden = EXPANSION * head_dim
    return {
        "W1": (head_dim, hidden),
        "b1": (1, hidden),
        "W2": (hidden, head_dim),
        "b2": (1, head_dim),
    }


def _load_kernels():
    from megatron_ttt.mixers.ttt.mlp import backward_kernel, forward_kernel

    return forward_kernel.forward, backward_kernel.backward


MLP = InnerModel("mlp", _state_shapes, mini_batch, predict, (56, 20), MLPWorkspace, _load_kernels)
