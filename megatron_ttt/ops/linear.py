"""TTT-Linear over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

The loops hold the state's chain, and the backward its gradient's; all else is batched.
"""

import torch

from megatron_ttt.ops.group import Group, augment, augmented, each, flat


class LinearGroup(Group):
    SIZE = 8

    @staticmethod
    def pack(W, b):
        return (augment(W, b),)

    @staticmethod
    def unpack(W_AEF, B, H):
        F = W_AEF.shape[-1]
        W = W_AEF.unflatten(0, (B, H))
        return W[..., :F, :], W[..., F : F + 1, :]

    def __init__(self, N, A, K, W_AEF, for_backward=False):
        F = W_AEF.shape[-1]
        super().__init__(N, A, K, F, W_AEF, for_backward)
        new, E = W_AEF.new_empty, augmented(F)
        self.W_NAEF = new(N, A, E, F)
        # The last mini-batch steps to the first one's place, where the next group begins.
        self.mini_batches = each(
            x=self.x_NAKE,
            stepT=self.step_NAKE.mT,
            u=self.u_NAKF,
            Z=self.Z_NAKF,
            G=self.G_NAKF,
            W=self.W_NAEF,
            W_next=self.W_NAEF.roll(-1, 0),
        )
