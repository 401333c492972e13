"""What the scan asks of an inner model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron_ttt.mixers.ttt.workspace import MiniBatchWorkspace

CHECKPOINT_INTERVAL = 16
"""Mini-batches between states that the kernels and the scan in C++ save for the backward pass."""

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class InnerModel:
    """A model that the scan trains, with its implementations.

    Sizes: B batch, H heads, K mini-batch, F head dim. Tensors of `mini_batch` and `predict` are
    [B, H, ...] in the dtype to compute in.
    """

    name: str
    """Its name in messages and in the C++ and Triton backends: "linear" or "mlp"."""
    state_shapes: Callable[[int], dict[str, tuple[int, int]]]
    """From the head dim to the names and shapes of one head's state, in the order of the state's
    tensors. Names of weights begin with W, those of biases with b."""
    mini_batch: Callable[..., tuple[Tensor, State]]
    """(q, x, v, lam, tau, gamma, beta, state) -> the outputs of a mini-batch and the next state:
    the reference, which autograd differentiates."""
    predict: Callable[[Tensor, State], Tensor]
    """(x, state) -> the output before its LayerNorm."""
    flops: tuple[int, int]
    """FLOPs of the scan for a token and a feature: the multiples of F and of K."""
    workspace: type[MiniBatchWorkspace] | None = None
    """Its mini-batches in PyTorch, with their own backward; None: the reference alone."""
    load_kernels: Callable[[], tuple[Callable, Callable]] | None = None
    """Import its Triton kernels; return the functions that launch forward and backward."""
