"""The fast TTT scan in plain PyTorch: its own backward, linear in sequence length.

The sequence is cut into groups of mini-batches, which `linear.py` and `mlp.py` take through the
inner model. The forward keeps the state before each group, and of each token Z and Zbar, the inner
model's outputs for key and query; the backward finds everything else again, a group at a time
from the last to the first.

Sizes: B batch, H heads, L sequence, F head dim, K mini-batch, N mini-batches of a group,
A (batch, head) pairs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttt.ops.linear import LinearGroup
from megatron_ttt.ops.mlp import MLPGroup

GROUP = {2: LinearGroup, 4: MLPGroup}  # by the number of tensors in the state
CPU_HEADS = 32  # (batch, head) pairs at a time on a CPU, for its caches; a GPU takes all


def torch_scan(q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF, state):
    """As `ttt_scan`, with the state [B, H, ...] in the dtype to compute in."""
    inputs = q_BHLF, k_BHLF, v_BHLF, lam_BHL, tau_K, gamma_HF, beta_HF
    output_BHLF, *final_state = Scan.apply(*inputs, *state)
    return output_BHLF, tuple(final_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lam, tau, gamma, beta, *state):
        Group = GROUP[len(state)]
        like = state[0]
        output = torch.empty_like(q)
        Z, Zbar = (torch.empty_like(q, dtype=like.dtype) for _ in range(2))
        final_state = [W.new_empty(W.shape) for W in state]
        checkpoints = []
        for block in blocks(q):
            shared = shared_by_groups(tau, gamma, beta, block, q, like)
            tokens = [x[block] for x in (q, k, v, lam, output, Z, Zbar)]
            groups = list(zip(*(cut(x, len(tau), Group.SIZE) for x in tokens)))
            carried = Group.pack(*(W[block] for W in state))
            before = [c.new_empty(len(groups), *c.shape) for c in carried]
            group = None
            for g, (q_g, k_g, v_g, lam_g, output_g, Z_g, Zbar_g) in enumerate(groups):
                for checkpoint, c in zip(before, carried):
                    checkpoint[g] = c
                if group is None or group.shape != q_g.shape:
                    group = Group(q_g.shape, carried)
                group.load(q_g, k_g, v_g, lam_g, *shared)
                output_g.copy_(group.forward())
                Z_g.copy_(group.per_head(group.Z_NAKF))
                Zbar_g.copy_(group.per_head(group.Zbar_NAKF))
                carried = group.state
            checkpoints += before
            write(final_state, block, Group.unpack(*carried))
        ctx.state_shapes = [W.shape for W in state]
        ctx.save_for_backward(q, k, v, lam, tau, gamma, beta, Z, Zbar, *checkpoints)
        ctx.set_materialize_grads(False)
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_final_state):
        q, k, v, lam, tau, gamma, beta, Z, Zbar, *checkpoints = ctx.saved_tensors
