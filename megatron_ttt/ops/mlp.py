"""TTT-MLP over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

A state is 32 times as large as a mini-batch's tokens and the hidden layer four times, so nearly
everything happens inside the loop, where a mini-batch's tensors are in cache. The forward steps
the state in place; the backward's own forward run keeps every mini-batch's state and hidden
tensors, which are most of what a group occupies.

Sizes beside those of `group.py`: M hidden width, J > M the hidden units, a constant 1 and zeros.
The first layer is transposed, U1 [M, E]: MKL is slow at [K, M] times the transpose of [E, M].
"""

import torch

from megatron_ttt.ops.gelu import EXACT, ROUNDED, Gelu
from megatron_ttt.ops.group import Group, augment, augmented, each, flat


class MLPGroup(Group):
    SIZE = 8

    @staticmethod
    def pack(W1, b1, W2, b2):
        return augment(W1, b1).mT.contiguous(), augment(W2, b2)

    @staticmethod
    def unpack(U1_AME, W2_AJF, B, H):
        M, F = U1_AME.shape[1], W2_AJF.shape[2]
        W1, W2 = U1_AME.mT.unflatten(0, (B, H)), W2_AJF.unflatten(0, (B, H))
        return W1[..., :F, :], W1[..., F : F + 1, :], W2[..., :M, :], W2[..., M : M + 1, :]

    def __init__(self, N, A, K, U1_AME, W2_AJF, for_backward=False):
        M, F = U1_AME.shape[1], W2_AJF.shape[2]
        super().__init__(N, A, K, F, U1_AME, for_backward)
        new, E, J = U1_AME.new_empty, augmented(F), augmented(M)
        self.keep = for_backward
        self.gelu = Gelu(EXACT, U1_AME)
        # gelu' of the inner gradient; see gelu.py.
        self.inner_gelu = self.gelu
        if U1_AME.dtype == torch.float64:
            self.inner_gelu = Gelu(ROUNDED, U1_AME)
        self.S2_NAKK, self.P2_NAKK = new(2, N, A, K, K)
        self.step2_NAKF = new(N, A, K, F)
        self.Z1s_A2KM = new(A, 2 * K, M)
        self.Z1bar_AKM, self.H_AKM, self.gate_AKM, self.scratch_AKM = new(4, A, K, M)

        kept = N if for_backward else 1
        self.X2s = U1_AME.new_zeros(kept, A, 2 * K, J)  # X2bar's rows, then X2's
        self.X2s[..., M] = 1
        self.dgelu, self.G1 = new(2, kept, A, K, M)

        def per(x):
            return list(x) if for_backward else list(x) * N

        self.state = U1_AME, W2_AJF
        if for_backward:
            U1 = [U1_AME, *new(N - 1, A, M, E), None]
            W2 = [W2_AJF, *new(N - 1, A, J, F), None]
        else:
            U1, W2 = [U1_AME] * N, [W2_AJF] * N
        X2bar, X2 = self.X2s.split(K, 2)
        self.mini_batches = each(
            qx=self.qx_NA2KE,
            step=self.step_NAKE,
            rate=self.rate_NAK1,
            u=self.u_NAKF,
            eta=self.eta_NAKK,
            P=self.P_NAKK,
            S2=self.S2_NAKK,
            P2=self.P2_NAKK,
            step2=self.step2_NAKF,
            Z=self.Z_NAKF,
            Zbar=self.Zbar_NAKF,
            U1=U1[:N],
            U1T=[u.mT for u in U1[:N]],
            U1_next=U1[for_backward:],
            W2=W2[:N],
            W2T=[w[:, :M].mT for w in W2[:N]],
            W2_next=W2[for_backward:],
            X2=per(X2),
            X2T=per(X2.mT),
            X2_M=per(X2[..., :M]),
            X2bar=per(X2bar),
            X2bar_M=per(X2bar[..., :M]),
            dgelu=per(self.dgelu),
            G1=per(self.G1),
            G1T=per(self.G1.mT),
        )
        if for_backward:
            self.allocate_backward()

    def allocate_backward(self):
        N, A, K, F, E = self.sizes
        _, _, _, J = self.X2s.shape
        M = self.G1.shape[-1]
        new, zeros = self.u_NAKF.new_empty, self.u_NAKF.new_zeros
        self.dgelu_bar, self.Hd2gelu = new(2, N, A, K, M)
        self.dgelu_exact = self.dgelu
        if self.inner_gelu is not self.gelu:
            self.dgelu_exact = new(N, A, K, M)
        self.dX2bar_AKM, self.dX2_AKM, self.dG1_AKM = new(3, A, K, M)
        self.dZ1s_A2KM = new(A, 2 * K, M)  # dZ1bar's rows, then dZ1's
        self.dH_AKJ = zeros(A, K, J)
        self.dS1_NAKK = zeros(N, A, K, K)
        self.GdW1_NAKE, self.Y2_NAKF = new(N, A, K, E), new(N, A, K, F)
        X2bar, X2 = self.X2s.split(K, 2)
        for m, more in zip(self.mini_batches, each(
            PT=self.P_NAKK.mT,
            U1_F=[m.U1[..., :F] for m in self.mini_batches],
            X2sT=self.X2s.mT,
            dgelu_bar=self.dgelu_bar,
            dgelu_exact=self.dgelu_exact,
            Hd2gelu=self.Hd2gelu,
            h=self.h_NAK1,
            scale=self.scale_NAK1,
            dG=self.dG_NAKF,
            dS2=self.dS_NAKK,
            dS2T=self.dS_NAKK.mT,
            dZbar=self.dZbar_NAKF,
            dZ=self.dZ_NAKF,
            dZZ=self.dZZ_NA2KF,
            dP1=self.dS1_NAKK,
            GdW1=self.GdW1_NAKE,
            Y2=self.Y2_NAKF,
            dq=self.dq_NAKF,
            dx=self.dx_NAKF,
        )):
            m.__dict__.update(more.__dict__)

    def run(self, U1_AME, W2_AJF):
        if self.keep:
            m = self.mini_batches[0]
            m.U1, m.U1T, m.W2, m.W2T = U1_AME, U1_AME.mT, W2_AJF, W2_AJF[:, : self.G1.shape[-1]].mT
            m.U1_F = U1_AME[..., :self.sizes[3]]
        Z1s, Z1bar, H, gate = self.Z1s_A2KM, self.Z1bar_AKM, self.H_AKM, self.gate_AKM
        Z1q, Z1 = Z1s.split(self.sizes[2], 1)
        gelu, inner_gelu, scratch = self.gelu, self.inner_gelu, self.scratch_AKM
        same = gelu is inner_gelu
        for i, m in enumerate(self.mini_batches):
            torch.bmm(m.qx, m.U1T, out=Z1s)
            X2 = gelu.forward(Z1, gate, out=m.X2_M)
            torch.bmm(m.X2, m.W2, out=m.Z)
            G2 = self.inner_gradient(m.Z, m.u)
            torch.bmm(G2, m.W2T, out=H)
            if not same:
                if self.keep:
                    gelu.derivative(Z1, gate, X2, out=self.dgelu_exact[i])
                X2 = inner_gelu.forward(Z1, gate, out=scratch)
            inner_gelu.derivative(Z1, gate, X2, out=m.dgelu)
            torch.mul(H, m.dgelu, out=m.G1)
            if self.keep:
                inner_gelu.second_derivative(Z1, gate, scratch, out=self.Hd2gelu[i]).mul_(H)
            torch.baddbmm(Z1q, m.P, m.G1, alpha=-1, out=Z1bar)
            X2bar = gelu.forward(Z1bar, gate, out=m.X2bar_M)
            if self.keep:
                gelu.derivative(Z1bar, gate, X2bar, out=self.dgelu_bar[i])
            torch.bmm(m.X2bar, m.X2T, out=m.S2)
            torch.mul(m.S2, m.eta, out=m.P2)
            torch.bmm(m.X2bar, m.W2, out=m.Zbar).baddbmm_(m.P2, G2, alpha=-1)
            torch.mul(G2, m.rate, out=m.step2)
            if m.U1_next is not None:
                torch.baddbmm(m.U1, m.G1T, m.step, out=m.U1_next)
                torch.baddbmm(m.W2, m.X2T, m.step2, out=m.W2_next)

    def forward(self):
        """The outputs; the state steps in place."""
        self.run(*self.state)
        return self.output()

    def backward(self, d_out, U1_AME, W2_AJF):
        """Gradients of q, k, v, lam, tau, gamma and beta, and of the state before the group."""
        K, F = self.sizes[2:4]
        M = self.G1.shape[-1]
        self.run(U1_AME, W2_AJF)
        torch.stack(self.gradients, out=self.G_NAKF)
        self.output_backward(d_out)
        self.response_backward(self.P2_NAKK, self.S2_NAKK.tril_())
        self.prepare_inner_gradient_backward()
        dU1, dW2 = self.state
        dU1T, dW2T = dU1.mT, dW2[:, :M].mT
        dX2bar, dX2, dG1, dZ1s, dH = self.dX2bar_AKM, self.dX2_AKM, self.dG1_AKM, self.dZ1s_A2KM, self.dH_AKJ
        dZ1sT, dHT, dH_M = dZ1s.mT, dH.mT, dH[..., :M]
        dZ1bar, dZ1 = dZ1s.split(K, 1)
        for m, norm, G2 in zip(
            reversed(self.mini_batches), reversed(self.norms), reversed(self.gradients)
        ):
            torch.bmm(m.dZbar, m.W2T, out=dX2bar).baddbmm_(m.dS2, m.X2_M)
            torch.mul(dX2bar, m.dgelu_bar, out=dZ1bar)
            torch.bmm(m.dS2T, m.X2bar_M, out=dX2).baddbmm_(m.step2, dW2T)
            m.dP1.baddbmm_(dZ1bar, m.G1T, beta=0, alpha=-1)
            dG1.baddbmm_(m.PT, dZ1bar, beta=0, alpha=-1).baddbmm_(m.step, dU1T)
            torch.bmm(m.G1, dU1, out=m.GdW1)
            torch.bmm(m.X2, dW2, out=m.Y2)
            torch.mul(dG1, m.dgelu, out=dH_M)
            m.dG.addcmul_(m.rate, m.Y2).baddbmm_(dH, m.W2)
            self.inner_gradient_backward(norm, G2, m.h, m.scale, m.dG, m.dZ)
            dX2.baddbmm_(m.dZ, m.W2T)
            torch.mul(dG1, m.Hd2gelu, out=dZ1).addcmul_(dX2, m.dgelu_exact)
            dW2.baddbmm_(m.X2sT, m.dZZ).baddbmm_(dHT, G2)
            dU1.baddbmm_(dZ1sT, m.qx)
            m.dq.baddbmm_(dZ1bar, m.U1_F)
            torch.bmm(dZ1, m.U1_F, out=m.dx)

        dPS = self.S2_NAKK.addcmul_(self.S_NAKK, self.dS1_NAKK)
        dS1 = flat(self.dS1_NAKK.mul_(self.eta_NAKK))
        flat(self.dq_NAKF).baddbmm_(dS1, flat(self.x_NAKF))
        flat(self.dx_NAKF).baddbmm_(dS1.mT, flat(self.q_NAKF))
        GdW1 = self.GdW1_NAKE
        self.dx_NAKF.addcmul_(self.rate_NAK1, GdW1[..., :F])
        Y = GdW1.mul_(self.x_NAKE).sum(-1) + self.Y2_NAKF.mul_(self.G_NAKF).sum(-1)
        dlam, dtau = self.rates_backward(dPS, Y)
        dv = self.target_backward()
        inputs = self.dq_NAKF, self.dx_NAKF, dv, dlam, dtau, self.dgamma_AF, self.dbeta_AF
        return inputs
