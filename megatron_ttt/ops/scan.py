"""The fast TTT scan in plain PyTorch: its own backward, linear in sequence length.

The sequence is cut into groups of mini-batches, which `linear.py` and `mlp.py` take through the
inner model. The forward keeps the state before each group and, of each token, Z and Zbar, the
inner model's outputs for key and query. The backward finds everything else again, one group at a
time from the last to the first.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N mini-batches of a group, A pairs
of batch and head.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.linear import LinearGroup
from megatron_ttt.ops.mlp import MLPGroup

GROUP = {2: LinearGroup, 4: MLPGroup}  # by the number of tensors in the state
CPU_HEADS = 32  # of A at a time on a CPU, which likes them in cache; a GPU takes all


def torch_scan(q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, state):
    """As `ttt_scan`, with the state [B, H, ...] in the dtype to compute in."""
    output, *final_state = Scan.apply(
        q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, *state
    )
    return output, tuple(final_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lam, tau, gamma, beta, *state):
        dtype = state[0].dtype
        output, Z, Zbar = torch.empty_like(q), *(torch.empty_like(q, dtype=dtype) for _ in "ab")
        final_state = [W.new_empty(W.shape) for W in state]
        checkpoints = []
        for block in blocks_of_heads(q):
            checkpoints += forward_block(
                [x[block] for x in (q, k, v, lam, output, Z, Zbar)],
                shared_by_tokens(tau, gamma, beta, block, q, dtype),
                [W[block] for W in state],
                [W[block] for W in final_state],
            )
        ctx.state_shapes = [W.shape for W in state]
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, Z, Zbar, *checkpoints)
        ctx.set_materialize_grads(False)
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final_state):
        q, k, v, lam, tau, gamma, beta, Z, Zbar, *checkpoints = ctx.saved_tensors
        dtype = Z.dtype
        d_output = torch.zeros_like(q) if d_output is None else d_output
        d_state = [
            Z.new_zeros(shape) if d is None else d.clone()
            for d, shape in zip(d_final_state, ctx.state_shapes)
        ]
        dq, dk, dv, dlam = (torch.empty_like(x) for x in (q, k, v, lam))
        dtau, dgamma, dbeta = (torch.zeros_like(x, dtype=dtype) for x in (tau, gamma, beta))
        checkpoints = iter(checkpoints)
        for block in blocks_of_heads(q):
            sums = backward_block(
                [x[block] for x in (q, k, v, lam, Z, Zbar, d_output, dq, dk, dv, dlam)],
                shared_by_tokens(tau, gamma, beta, block, q, dtype),
                [next(checkpoints) for _ in range(len(d_state) // 2)],
                [d[block] for d in d_state],
            )
            for d, s in zip((dtau, dgamma[block[1]], dbeta[block[1]]), sums):
                d += s
        shared = (d.to(x.dtype) for d, x in zip((dtau, dgamma, dbeta), (tau, gamma, beta)))
        return dq, dk, dv, dlam, *shared, *d_state


def forward_block(tokens, shared, state, final_state):
    """Fill output, Z, Zbar (the last of `tokens`) and `final_state`; return the checkpoints."""
    Group = GROUP[len(state)]
    groups = cut(tokens, len(shared[0]), Group.SIZE)
    carried = Group.pack(*state)
    checkpoints = [W.new_empty(len(groups), *W.shape) for W in carried]
    group = None
    for g, (q, k, v, lam, output, Z, Zbar) in enumerate(groups):
        for checkpoint, W in zip(checkpoints, carried):
            checkpoint[g] = W
        if group is None or group.shape != q.shape:
            group = Group(q.shape, carried)
        group.load(q, k, v, lam, *shared)
        output.copy_(group.forward())
        Z.copy_(group.by_head(group.Z_NAKF))
        Zbar.copy_(group.by_head(group.Zbar_NAKF))
        carried = group.state
    for W, after in zip(final_state, Group.unpack(*carried)):
        W.copy_(after.unflatten(0, W.shape[:2]))
    return checkpoints


def backward_block(tokens, shared, checkpoints, d_state):
    """Fill the tokens' gradients (the last of `tokens`) and take `d_state` from the final to the
    initial state's; return the gradients of tau, gamma and beta."""
    Group = GROUP[len(d_state)]
    groups = cut(tokens, len(shared[0]), Group.SIZE)
    d_carried = Group.pack(*d_state)
    sums = [0, 0, 0]
    group = None
    for g in reversed(range(len(groups))):
        q, k, v, lam, Z, Zbar, d_output, *d_tokens = groups[g]
        before = [checkpoint[g] for checkpoint in checkpoints]
        if group is None or group.shape != q.shape:
            group = Group(q.shape, before, d_carried)
        group.load(q, k, v, lam, *shared)
        group.restore(before, Z, Zbar)
        *gradients, dtau, dgamma, dbeta = group.backward(d_output)
        for d, gradient in zip(d_tokens, gradients):
            d.copy_(gradient)
        sums = [s + d for s, d in zip(sums, (dtau, dgamma, dbeta))]
    for d, before in zip(d_state, Group.unpack(*d_carried)):
        d.copy_(before.unflatten(0, d.shape[:2]))
    return sums


def blocks_of_heads(x_BHLF: Tensor) -> list[tuple[slice, slice]]:
    """Slices of batch and heads to take at a time."""
    B, H = x_BHLF.shape[:2]
    A = CPU_HEADS if x_BHLF.device.type == "cpu" else B * H
    b, h = max(A // H, 1), min(A, H)
    return [(slice(i, i + b), slice(j, j + h)) for i in range(0, B, b) for j in range(0, H, h)]


def shared_by_tokens(tau_K, gamma_HF, beta_HF, block, x_BHLF, dtype):
    """tau_K, gamma_A1F and beta_A1F of a block of heads."""
    b = x_BHLF[block].shape[0]
    gamma, beta = (x[block[1]].to(dtype).repeat(b, 1).unsqueeze(1) for x in (gamma_HF, beta_HF))
    return tau_K.to(dtype), gamma, beta


def cut(tokens: list[Tensor], K: int, size: int) -> list[tuple[Tensor, ...]]:
    """Groups of `size` mini-batches, [N, B, H, K, ...] views of each tensor; a ragged end last."""
    N, r = divmod(tokens[0].shape[2], K)
    groups = []
    if N > 0:
        whole = (x[:, :, : N * K].unflatten(2, (N, K)).movedim(2, 0) for x in tokens)
        groups += zip(*(x.split(size) for x in whole))
    if r > 0:
        groups.append(tuple(x[:, :, N * K :].unsqueeze(0) for x in tokens))
    return groups
