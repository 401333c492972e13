"""The fast TTT scan in plain PyTorch: its own backward, linear in sequence length.

The sequence is cut into groups of mini-batches, which pass through the inner model's workspace.
The forward keeps the state after each group and, for each token, Z and Zbar, the inner model's
outputs for key and query, with their LayerNorms' statistics (TTT-MLP: also the hidden layers). The
backward computes everything else again, one group at a time from the last to the first: a group
starts from the state after the one before it, the first from the initial state.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N mini-batches of a group, A pairs
of batch and head.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.mixers.ttt.inner_model import InnerModel

CPU_HEADS = 32  # of A at a time on a CPU, which likes them in cache; a GPU takes all


def torch_scan(model: InnerModel, q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, state):
    """As `ttt_scan`, with the state [B, H, ...] in the dtype to compute in."""
    output, *final_state = Scan.apply(
        model.workspace, q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, *state
    )
    return output, tuple(final_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, workspace, q, k, v, lam, tau, gamma, beta, *state):
        dtype = state[0].dtype
        output = torch.empty_like(q)
        final_state = [W.new_empty(W.shape) for W in state]
        kept = []
        for block in blocks_of_heads(q):
            kept += forward_block(
                workspace,
                [x[block] for x in (q, k, v, lam, output)],
                shared_by_tokens(tau, gamma, beta, block, q, dtype),
                [W[block] for W in state],
                [W[block] for W in final_state],
            )
        kept_by_group = (x for group in kept for x in group)
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, *state, *kept_by_group)
        ctx.workspace = workspace
        ctx.state_tensors, ctx.kept_each = len(state), len(kept[0])
        ctx.set_materialize_grads(False)
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final_state):
        q, k, v, lam, tau, gamma, beta, *kept = ctx.saved_tensors
        state, kept = kept[: ctx.state_tensors], kept[ctx.state_tensors :]
        kept = [kept[i : i + ctx.kept_each] for i in range(0, len(kept), ctx.kept_each)]
        d_output = torch.zeros_like(q) if d_output is None else d_output
        dtype = state[0].dtype
        d_state = [
            W.new_zeros(W.shape) if d is None else d.clone() for d, W in zip(d_final_state, state)
        ]
        dq, dk, dv, dlam = (torch.empty_like(x) for x in (q, k, v, lam))
        dtau, dgamma, dbeta = (torch.zeros_like(x, dtype=dtype) for x in (tau, gamma, beta))
        blocks = blocks_of_heads(q)
        groups = len(kept) // len(blocks)
        for i, block in enumerate(blocks):
            sums = backward_block(
                ctx.workspace,
                [x[block] for x in (q, k, v, lam, d_output, dq, dk, dv, dlam)],
                shared_by_tokens(tau, gamma, beta, block, q, dtype),
                [W[block] for W in state],
                kept[i * groups : (i + 1) * groups],
                [d[block] for d in d_state],
            )
            for d, s in zip((dtau, dgamma[block[1]], dbeta[block[1]]), sums):
                d += s
        shared = (d.to(x.dtype) for d, x in zip((dtau, dgamma, dbeta), (tau, gamma, beta)))
        return None, dq, dk, dv, dlam, *shared, *d_state


@torch.inference_mode()
def forward_block(Workspace, tokens, shared, state, final_state):
    """Fill output (the last of `tokens`) and `final_state`; return what each group keeps."""
    carried = Workspace.pack(*state)
    kept = []
    group = None
    for q, k, v, lam, output in cut(tokens, len(shared[0]), Workspace.SIZE):
        if group is None or group.shape != q.shape:
            group = Workspace(q.shape, carried)
            group.start(*carried)
        group.load(q, k, v, lam, *shared)
        group.forward(output)
        kept.append(group.kept)
        carried = group.state
    for W, after in zip(final_state, Workspace.unpack(*carried)):
        W.copy_(after.unflatten(0, W.shape[:2]))
    return kept


@torch.inference_mode()
def backward_block(Workspace, tokens, shared, state, kept, d_state):
    """Fill the tokens' gradients (the last of `tokens`) and take `d_state` from the final to the
    initial state's; return the gradients of tau, gamma and beta."""
    groups = cut(tokens, len(shared[0]), Workspace.SIZE)
    d_carried = Workspace.pack(*d_state)
    # Of each group the state before it: of the first the initial one.
    before = [Workspace.pack(*state), *(of_group[: len(d_carried)] for of_group in kept[:-1])]
    sums = [0, 0, 0]
    group = None
    for tokens_of_group, before_group, kept_of_group in zip(*map(reversed, (groups, before, kept))):
        q, k, v, lam, d_output, *d_tokens = tokens_of_group
        if group is None or group.shape != q.shape:
            group = Workspace(q.shape, before_group, d_carried)
        group.load(q, k, v, lam, *shared)
        group.restore(before_group, *kept_of_group)
        sums = [s + d for s, d in zip(sums, group.backward(d_output, d_tokens))]
    for d, before in zip(d_state, Workspace.unpack(*d_carried)):
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
