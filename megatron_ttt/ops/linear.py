"""TTT-Linear over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

Only what carries the state from one mini-batch to the next is a loop; the rest is batched over
the group, states included: one is only four times the size of a mini-batch's tokens.
Bias and weights are one matrix, see `group.py`.
"""

import torch

from megatron_ttt.ops.group import Group, augment, flat


class LinearGroup(Group):
    SIZE = 8

    @staticmethod
    def pack(W, b):
        return (augment(W, b),)

    @staticmethod
    def unpack(W_AEF, B, H):
        F = W_AEF.shape[-1]
        W = W_AEF.unflatten(0, (B, H))
        return W[..., :F, :].contiguous(), W[..., F : F + 1, :].contiguous()

    def __init__(self, N, A, K, F, like):
        super().__init__(N, A, K, F, like)
        self.W_NAEF = like.new_empty(N + 1, A, self.E, F)
        views = self.x_NAKE, self.u_NAKF, self.step_NAKE.mT, self.Z_NAKF, self.W_NAEF, self.W_NAEF[1:]
        self.forward_views = list(zip(*views))

    def prepare_backward(self):
        super().prepare_backward()
        N, A, K, F = self.shape
        self.dW_NAEF = self.W_NAEF.new_empty(N + 1, A, self.E, F)
        self.R_NAKE = self.W_NAEF.new_empty(N, A, K, self.E)
        views = (
            self.step_NAKE, self.D_NAKF, self.qx_NA2KE.mT, self.dZ_NAKF, self.dZZ_NA2KF,
            self.dW_NAEF, self.dW_NAEF[1:],
        )
        self.backward_views = list(zip(*views))[::-1]

    def run(self, W_AEF):
        self.W_NAEF[0] = W_AEF
        for x, u, stepT, Z, W, W_next in self.forward_views:
            torch.bmm(x, W, out=Z)
            torch.baddbmm(W, stepT, self.inner_gradient(Z, u), out=W_next)
        G, Zbar = torch.stack(self.gradients, out=self.G_NAKF), flat(self.Zbar_NAKF)
        torch.bmm(flat(self.q_NAKE), flat(self.W_NAEF[:-1]), out=Zbar)
        Zbar.baddbmm_(flat(self.P_NAKK), flat(G), alpha=-1)

    def forward(self, W_AEF):
        self.run(W_AEF)
        return self.answer(), (self.W_NAEF[-1],)

    def backward(self, W_AEF, d_out, dW_AEF):
        N, A, K, F = self.shape
        self.run(W_AEF)
        self.answer_backward(d_out)
        G, P, dS, D, dZbar, dZ = map(flat, (self.G_NAKF, self.P_NAKK, self.dS_NAKK, self.D_NAKF, self.dZbar_NAKF, self.dZ_NAKF))
        dP = dS.baddbmm_(dZbar, G.mT, beta=0, alpha=-1)
        D.baddbmm_(P.mT, dZbar, beta=0, alpha=-1)
        self.dW_NAEF[N] = dW_AEF
        self.prepare_gradient_backward()
        for views, norm, G_i, h, scale in zip(
            self.backward_views, self.norms[::-1], self.gradients[::-1], reversed(self.h_NAK1.unbind()), reversed(self.scale_NAK1.unbind())
        ):
            step, D_i, qxT, dZ_i, dZZ, dW, dW_next = views
            D_i.baddbmm_(step, dW_next)
            self.gradient_backward(norm, G_i, h, scale, D_i, dZ_i)
            torch.baddbmm(dW_next, qxT, dZZ, out=dW)
        dPS = self.S_NAKK.mul_(self.dS_NAKK)
        self.dS_NAKK *= self.rates_NAKK
        WT = flat(self.W_NAEF[:-1, :, :F]).mT
        dq, dx = flat(self.dq_NAKF), flat(self.dx_NAKF)
        dq.baddbmm_(dZbar, WT).baddbmm_(dS, flat(self.x_NAKF))
        torch.bmm(dZ, WT, out=dx).baddbmm_(dS.mT, flat(self.q_NAKF))
        R = self.R_NAKE
        torch.bmm(G, flat(self.dW_NAEF[1:]).mT, out=flat(R))
        self.dx_NAKF.addcmul_(self.rate_NAK1, R[..., :F])
        Y = R.mul_(self.x_NAKE).sum(-1)
        dlam, dtau = self.rates_backward(dPS, Y)
        dv = self.target_backward()
        return (self.dq_NAKF, self.dx_NAKF, dv, dlam, dtau, self.dgamma_AF, self.dbeta_AF), (self.dW_NAEF[0],)
