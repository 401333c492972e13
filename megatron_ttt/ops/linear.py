"""TTT-Linear over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

Only what carries the state from one mini-batch to the next is a loop; the rest is batched over
the group, states included: a state is but four times as large as a mini-batch's tokens.
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
        self.W_NAEF = new(N + 1, A, E, F)
        self.mini_batches = each(
            x=self.x_NAKE,
            stepT=self.step_NAKE.mT,
            u=self.u_NAKF,
            Z=self.Z_NAKF,
            W=self.W_NAEF,
            W_next=self.W_NAEF[1:],
        )
        if for_backward:
            self.dW_NAEF, self.GdW_NAKE = new(N + 1, A, E, F), new(N, A, K, E)
            self.backward_mini_batches = each(
                step=self.step_NAKE,
                qxT=self.qx_NA2KE.mT,
                h=self.h_NAK1,
                scale=self.scale_NAK1,
                dG=self.dG_NAKF,
                dZ=self.dZ_NAKF,
                dZZ=self.dZZ_NA2KF,
                dW=self.dW_NAEF,
                dW_next=self.dW_NAEF[1:],
            )

    def run(self, W_AEF):
        self.W_NAEF[0] = W_AEF
        for m in self.mini_batches:
            torch.bmm(m.x, m.W, out=m.Z)
            torch.baddbmm(m.W, m.stepT, self.inner_gradient(m.Z, m.u), out=m.W_next)
        torch.stack(self.gradients, out=self.G_NAKF)
        Zbar = flat(self.Zbar_NAKF)
        torch.bmm(flat(self.q_NAKE), flat(self.W_NAEF[:-1]), out=Zbar)
        Zbar.baddbmm_(flat(self.P_NAKK), flat(self.G_NAKF), alpha=-1)

    def forward(self, W_AEF):
        """The outputs, and the state after the group."""
        self.run(W_AEF)
        return self.output(), (self.W_NAEF[-1],)

    def backward(self, d_out, W_AEF, dW_AEF):
        """Gradients of q, k, v, lam, tau, gamma and beta, and of the state before the group."""
        F = W_AEF.shape[-1]
        self.run(W_AEF)
        self.output_backward(d_out)
        self.response_backward(self.P_NAKK, self.S_NAKK)
        self.prepare_inner_gradient_backward()
        self.dW_NAEF[-1] = dW_AEF
        for m, norm, G in zip(
            reversed(self.backward_mini_batches), reversed(self.norms), reversed(self.gradients)
        ):
            m.dG.baddbmm_(m.step, m.dW_next)
            self.inner_gradient_backward(norm, G, m.h, m.scale, m.dG, m.dZ)
            torch.baddbmm(m.dW_next, m.qxT, m.dZZ, out=m.dW)

        WT, dS = flat(self.W_NAEF[:-1, :, :F]).mT, flat(self.dS_NAKK)
        dq, dx = flat(self.dq_NAKF), flat(self.dx_NAKF)
        dq.baddbmm_(flat(self.dZbar_NAKF), WT).baddbmm_(dS, flat(self.x_NAKF))
        torch.bmm(flat(self.dZ_NAKF), WT, out=dx).baddbmm_(dS.mT, flat(self.q_NAKF))
        GdW = self.GdW_NAKE
        torch.bmm(flat(self.G_NAKF), flat(self.dW_NAEF[1:]).mT, out=flat(GdW))
        self.dx_NAKF.addcmul_(self.rate_NAK1, GdW[..., :F])
        dlam, dtau = self.rates_backward(self.S_NAKK, GdW.mul_(self.x_NAKE).sum(-1))
        dv = self.target_backward()
        inputs = self.dq_NAKF, self.dx_NAKF, dv, dlam, dtau, self.dgamma_AF, self.dbeta_AF
        return inputs, (self.dW_NAEF[0],)
