"""Count the bytes that what stands round the scan moves, as plain PyTorch and in one kernel.

    python tests/ops/bytes_moved.py

Arithmetic, not a measurement: an operation of ATen reads its inputs and writes its outputs, views
cost nothing, a kernel reads and writes each of its tensors once. Bytes a token and channel, bf16,
forward and backward; what does not grow with the tokens is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ttt.ops.conv_rope import causal_conv, reference_conv_rope
from megatron_ttt.ops.rope import mini_batch_angles
from megatron_ttt.ops.sharded_layer_norm import sharded_layer_norm

L, B, HEADS, HEAD_DIM, K, W = 2048, 1, 12, 64, 16, 4
D = HEADS * HEAD_DIM
ALONE = SimpleNamespace(size=lambda: 1)


class Counter(TorchDispatchMode):
    """Adds up the bytes of all operations' tensors."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        moved = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        read, written = moved[: -len(tree_leaves(result)) or None], tree_leaves(result)
        if function._schema.name not in FREE and not is_view(function):
            self.bytes += sum(map(nbytes, (*read, *(x for x in written if isinstance(x, Tensor)))))
        return result


FREE = {f"aten::{name}" for name in ("detach", "empty", "empty_like", "new_empty", "_unsafe_view")}


def is_view(function) -> bool:
    """Its result is an argument's memory, unwritten."""
    return any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)


def nbytes(x: Tensor) -> int:
    """Of what is there: an expanded dimension is there once."""
    sizes = (size for size, stride in zip(x.shape, x.stride()) if stride)
    return torch.Size(sizes).numel() * x.element_size()


def tokens() -> Tensor:
    return torch.randn(L, B, D).bfloat16().requires_grad_()


def weights(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def forms() -> Iterator[tuple[str, Callable, str, str]]:
    """Name, PyTorch form, and what the kernel reads and writes of the tokens, forward and
    backward."""
    convolutions = [(weights(D, 1, W), weights(D)) for _ in range(2)]
    angles = mini_batch_angles(K, HEAD_DIM, 1e4, torch.float32, torch.device("cpu"))
    x = tokens()
    yield (
        "two convolutions, RoPE",
        lambda: reference_conv_rope(x, convolutions, *angles),
        "x; q, k",
        "x, dq, dk; dx",
    )
    x, gate, weight, bias = tokens(), tokens(), weights(D), weights(D)
    yield (
        "post-norm, gate",
        lambda: [
            F.gelu(gate, approximate="tanh") * sharded_layer_norm(x, weight, bias, 1e-6, ALONE)
        ],
        "x, gate; out",
        "x, gate, dout; dx, dgate",
    )
    h, scale, conv = tokens(), weights(D), (weights(D, 1, W), weights(D))

    yield (
        "RMSNorm, pre-conv, residual",
        lambda: [h + causal_conv(F.rms_norm(h.float(), (D,), eps=1e-6).to(h.dtype) * scale, *conv)],
        "h, h; out",
        "h, dout, h, dout; dh",
    )


def main() -> None:
    print("| what | PyTorch, forward | backward | kernel, forward | backward |")
    print("|---|---|---|---|---|")
    for name, function, forward, backward in forms():
        cells = []
        with Counter() as counter:
            outputs = function()
        cells.append(counter.bytes)
        upstream = [torch.randn_like(y) for y in outputs]
        with Counter() as counter:
            torch.autograd.backward(outputs, upstream)
        cells.append(counter.bytes)
        cells = [f"{cell / (L * B * D):.0f}" for cell in cells]
        cells += [str(2 * len(names.replace(";", ",").split(","))) for names in (forward, backward)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
