"""TTT-Linear over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

The loops hold the chain of the state, and in the backward the chain of its gradient; the states
themselves the backward makes again from the state before the group.
"""

import torch

from megatron_ttt.mixers.ttt.workspace import (
    MiniBatchWorkspace,
    append_bias,
    merge_batch,
    per_mini_batch,
)


class LinearWorkspace(MiniBatchWorkspace):
    SIZE = 8

    @staticmethod
    def pack(W, b):
        return (append_bias(W, b),)

    @staticmethod
    def unpack(W_AEF):
        F = W_AEF.shape[-1]
        return W_AEF[:, :F], W_AEF[:, F : F + 1]

    def __init__(self, shape, state, d_state=None):
        (W_AEF,) = state
        super().__init__(shape, W_AEF, for_backward=d_state is not None)
        N, A, K, E = self.x_NAKE.shape
        F, new = shape[-1], W_AEF.new_empty
        self.W_NAEF, self.after_AEF = new(N, A, E, F), new(A, E, F)
        self.state = (self.after_AEF,)
        self.mini_batches = per_mini_batch(
            x=self.x_NAKE,
            stepT=self.step_NAKE.mT,
            u=self.u_NAKF,
            G=self.G_NAKF,
            W=self.W_NAEF,
            W_next=[*self.W_NAEF[1:], self.after_AEF],
        )
        if d_state is not None:
            (self.dW_AEF,) = d_state
            self.dW_NAEF = new(N, A, E, F)
            self.GdW_NAKE = new(N, A, K, E)
            self.dZZ_NA2KF = self.dZs_NA3KF[:, :, : 2 * K]  # without G
            self.backward_mini_batches = per_mini_batch(
                step=self.step_NAKE,
                xqT=self.xq_NA2KE.mT,
                dG=self.dG_NAKF,
                dZZ=self.dZZ_NA2KF,
                dW=[self.dW_AEF, *self.dW_NAEF[:-1]],
                dW_next=self.dW_NAEF,
            )

    def start(self, W_AEF):
        self.after_AEF.copy_(W_AEF)

    def forward(self, output):
        Z_NAKF, Zbar_NAKF = self.keep(2, *self.G_NAKF.shape)
        self.W_NAEF[0] = self.after_AEF
        gradients = []
        for m, Z in zip(self.mini_batches, Z_NAKF):
            torch.bmm(m.x, m.W, out=Z)
            G = self.inner_gradient(Z, m.u)
            gradients.append(G)
            torch.baddbmm(m.W, m.stepT, G, out=m.W_next)
        torch.stack(gradients, out=self.G_NAKF)
        Zbar = torch.bmm(
            merge_batch(self.q_NAKE), merge_batch(self.W_NAEF), out=merge_batch(Zbar_NAKF)
        )
        Zbar.baddbmm_(merge_batch(self.P_NAKK), merge_batch(self.G_NAKF), alpha=-1)
        after_AEF = self.keep(*self.after_AEF.shape).copy_(self.after_AEF)
        statistics_4NAK1 = self.write_output(Zbar_NAKF, output)
        self.kept = after_AEF, Z_NAKF, Zbar_NAKF, statistics_4NAK1

    def restore(self, before, _, *outputs):
        (W_AEF,) = before
        self.W_NAEF[0] = W_AEF
        self.restore_norms(*outputs)

    def backward(self, d_output, d_tokens):
        F = self.shape[-1]
        self.inner_gradients()
        for m in self.mini_batches[:-1]:
            torch.baddbmm(m.W, m.stepT, m.G, out=m.W_next)
        self.output_backward(d_output)
        PT, dZbar = merge_batch(self.P_NAKK).mT, merge_batch(self.dZbar_NAKF)
        merge_batch(self.dG_NAKF).baddbmm_(PT, dZbar, beta=0, alpha=-1)
        self.dW_NAEF[-1] = self.dW_AEF
        for m, hessian in zip(reversed(self.backward_mini_batches), reversed(self.hessians)):
            m.dG.baddbmm_(m.step, m.dW_next)
            self.inner_gradient_backward(hessian)
            torch.baddbmm(m.dW_next, m.xqT, m.dZZ, out=m.dW)

        WT_NAFF, GdW = self.W_NAEF[:, :, :F].mT, self.GdW_NAKE
        torch.bmm(
            merge_batch(self.dZZ_NA2KF), merge_batch(WT_NAFF), out=merge_batch(self.dxq_NA2KF)
        )
        torch.bmm(merge_batch(self.G_NAKF), merge_batch(self.dW_NAEF).mT, out=merge_batch(GdW))
        self.dx_NAKF.addcmul_(self.rate_NAK1, GdW[..., :F])
        dPS = self.S_NAKK.mul_(self.dP_NAKK)
        self.similarity_backward(self.dP_NAKK.mul_(self.eta_NAKK))
        return self.gradients(dPS, GdW.mul_(self.x_NAKE).sum(-1), d_output, d_tokens)
