"""TTT-Linear over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

The loops hold the chain of the state, and in the backward the chain of its gradient.
"""

import torch

from megatron_ttt.ops.group import Group, augment, each, flat


class LinearGroup(Group):
    SIZE = 8

    @staticmethod
    def pack(W, b):
        return (augment(W, b),)

    @staticmethod
    def unpack(W_AEF):
        F = W_AEF.shape[-1]
        return W_AEF[:, :F], W_AEF[:, F : F + 1]

    def __init__(self, shape, state, d_state=None):
        (W_AEF,) = state
        super().__init__(shape, W_AEF, for_backward=d_state is not None)
        N, A, K, E = self.x_NAKE.shape
        F, new = shape[-1], W_AEF.new_empty
        self.W_NAEF = new(N, A, E, F)
        self.state = (self.W_NAEF[0],)
        self.start(W_AEF)
        self.mini_batches = each(
            x=self.x_NAKE,
            stepT=self.step_NAKE.mT,
            u=self.u_NAKF,
            Z=self.Z_NAKF,
            G=self.G_NAKF,
            W=self.W_NAEF,
            W_next=[*self.W_NAEF[1:], None],
        )
        if d_state is not None:
            (self.dW_AEF,) = d_state
            self.dW_NAEF = new(N, A, E, F)
            self.GdW_NAKE = new(N, A, K, E)
            self.backward_mini_batches = each(
                step=self.step_NAKE,
                qxT=self.qx_NA2KE.mT,
                dG=self.dG_NAKF,
                dZZ=self.dZZ_NA2KF,
                dW=[self.dW_AEF, *self.dW_NAEF[:-1]],
                dW_next=self.dW_NAEF,
            )

    def start(self, W_AEF):
        self.W_NAEF[0] = W_AEF

    def forward(self):
        gradients = []
        for m in self.mini_batches:
            torch.bmm(m.x, m.W, out=m.Z)
            G = self.inner_gradient(m.Z, m.u)
            gradients.append(G)
            if m.W_next is not None:
                torch.baddbmm(m.W, m.stepT, G, out=m.W_next)
        torch.stack(gradients, out=self.G_NAKF)
        Zbar = flat(self.Zbar_NAKF)
        torch.bmm(flat(self.q_NAKE), flat(self.W_NAEF), out=Zbar)
        Zbar.baddbmm_(flat(self.P_NAKK), flat(self.G_NAKF), alpha=-1)
        torch.baddbmm(m.W, m.stepT, G, out=self.W_NAEF[0])
        return self.output()

    def backward(self, d_output):
        F = self.shape[-1]
        self.inner_gradients()
        for m in self.mini_batches[:-1]:
            torch.baddbmm(m.W, m.stepT, m.G, out=m.W_next)
        self.output_backward(d_output)
        self.response_backward(self.P_NAKK, self.S_NAKK)
        self.dW_NAEF[-1] = self.dW_AEF
        for m, g, norm in zip(
            reversed(self.backward_mini_batches),
            reversed(self.gradient_views),
            reversed(self.norms),
        ):
            m.dG.baddbmm_(m.step, m.dW_next)
            self.inner_gradient_backward(g, norm)
            torch.baddbmm(m.dW_next, m.qxT, m.dZZ, out=m.dW)

        WT, dS = flat(self.W_NAEF[:, :, :F]).mT, flat(self.dS_NAKK)
        dq, dx = flat(self.dq_NAKF), flat(self.dx_NAKF)
        dq.baddbmm_(flat(self.dZbar_NAKF), WT).baddbmm_(dS, flat(self.x_NAKF))
        torch.bmm(flat(self.dZ_NAKF), WT, out=dx).baddbmm_(dS.mT, flat(self.q_NAKF))
        GdW = self.GdW_NAKE
        torch.bmm(flat(self.G_NAKF), flat(self.dW_NAEF).mT, out=flat(GdW))
        self.dx_NAKF.addcmul_(self.rate_NAK1, GdW[..., :F])
        return self.gradients(self.S_NAKK, GdW.mul_(self.x_NAKE).sum(-1))
