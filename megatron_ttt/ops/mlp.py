"""TTT-MLP over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

A state is 32 times the size of a mini-batch's tokens, and so nearly everything happens inside the
loop, where a mini-batch's tensors are still in cache. The forward updates the state in place; the
backward's own forward run keeps each mini-batch's state and M-wide tensors, and they are the bulk
of the memory of a group.

Both layers keep weights and bias in one matrix with rows of the hidden width, see `group.py`:
U1 [M, E] is W1 and b1 transposed, W2 [J, F] is W2 over b2, J >= M + 1.
"""

import torch

from megatron_ttt.ops import gelu
from megatron_ttt.ops.group import Group, aligned, augment, flat


class MLPGroup(Group):
    SIZE = 4

    @staticmethod
    def pack(W1, b1, W2, b2):
        return augment(W1, b1).mT.contiguous(), augment(W2, b2)

    @staticmethod
    def unpack(U1_AME, W2_AJF, B, H):
        M, F = U1_AME.shape[1], W2_AJF.shape[2]
        W1, W2 = U1_AME.mT.unflatten(0, (B, H)), W2_AJF.unflatten(0, (B, H))
        parts = W1[..., :F, :], W1[..., F : F + 1, :], W2[..., :M, :], W2[..., M : M + 1, :]
        return tuple(part.contiguous() for part in parts)

    def __init__(self, N, A, K, F, like, W2):
        super().__init__(N, A, K, F, like)
        self.M, self.J = like.shape[-2], W2.shape[-2]
        self.allocate(1)

    def allocate(self, n):
        """Room for n mini-batches' states and M-wide tensors; with n = 1 the forward reuses it."""
        N, A, K, F = self.shape
        M, J = self.M, self.J
        new = self.u_NAKF.new_empty
        self.U1 = new(n + (n > 1), A, M, self.E)
        self.W2 = new(n + (n > 1), A, J, F)
        self.X2s = self.u_NAKF.new_zeros(n, A, 2 * K, J)
        self.X2s[..., M] = 1
        self.Z1s = new(n, A, 2 * K, M)
        self.Z1bar, self.gp, self.H, self.G1 = new(4, n, A, K, M)
        self.S2_NAKK, self.P2_NAKK = new(2, N, A, K, K)
        once = n == 1
        def per(x):
            return list(x) * N if once else list(x)
        X2bar, X2 = self.X2s.split(K, 2)
        nxt = self.U1 if once else self.U1[1:]
        nxt2 = self.W2 if once else self.W2[1:]
        self.forward_views = list(zip(
            self.qx_NA2KE, self.step_NAKE, self.u_NAKF, self.Z_NAKF, self.rates_NAKK, self.rate_NAK1, self.P_NAKK, self.S2_NAKK, self.P2_NAKK, self.Zbar_NAKF,
            per(self.U1), per(nxt), per(self.W2), per(self.W2[:, :, :M].mT), per(nxt2),
            per(self.Z1s), per(self.Z1s[:, :, :K]), per(self.Z1s[:, :, K:]), per(X2bar), per(X2bar[..., :M]), per(X2), per(X2[..., :M]), per(self.Z1bar), per(self.gp), per(self.H), per(self.G1),
        ))
