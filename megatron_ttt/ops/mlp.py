"""TTT-MLP over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

A state is 32 times as large as a mini-batch's tokens and a hidden layer four times, so it pays to
do everything with a mini-batch's hidden layers and state while they are in cache. The forward
steps the state in place; the backward's forward run keeps every mini-batch's.

Sizes beside those of `group.py`: M hidden width, J > M the hidden units, a constant 1 and zeros.
The first layer is transposed, U1 [M, E]: MKL is slow at [K, M] times the transpose of [E, M].
"""

import torch

from megatron_ttt.ops.gelu import EXACT, ROUNDED, Gelu
from megatron_ttt.ops.group import Group, augment, each, flat


class MLPGroup(Group):
    SIZE = 8

    @staticmethod
    def pack(W1, b1, W2, b2):
        return augment(W1, b1).mT.contiguous(), augment(W2, b2)

    @staticmethod
    def unpack(U1_AME, W2_AJF):
        M, F = U1_AME.shape[1], W2_AJF.shape[2]
        W1_AEM = U1_AME.mT
        return W1_AEM[:, :F], W1_AEM[:, F : F + 1], W2_AJF[:, :M], W2_AJF[:, M : M + 1]

    def __init__(self, shape, state, d_state=None):
        U1_AME, W2_AJF = state
        super().__init__(shape, U1_AME, for_backward=d_state is not None)
        N, A, K, E = self.x_NAKE.shape
        M, (J, F), new = U1_AME.shape[1], W2_AJF.shape[1:], U1_AME.new_empty
        self.M = M
        self.exact = Gelu(EXACT, U1_AME)
        # The constant of the inner gradient's gelu', see gelu.py.
        self.inner = Gelu(ROUNDED, U1_AME) if U1_AME.dtype == torch.float64 else self.exact
        self.Z1s_A2KM = new(A, 2 * K, M)
        self.Z1q_AKM, self.Z1_AKM = self.Z1s_A2KM.split(K, 1)
        self.Z1bar_AKM, self.H_AKM, self.gate_AKM, self.scratch_AKM = new(4, A, K, M)
        self.S2_NAKK, self.P2_NAKK, self.step2_NAKF = (
            new(N, A, K, K),
            new(N, A, K, K),
            new(N, A, K, F),
        )
        n = 1 if d_state is None else N
        self.X2s = U1_AME.new_zeros(n, A, 2 * K, J)  # X2bar's rows, then X2's
        self.X2s[..., M] = 1
        self.dgelu, self.G1 = new(2, n, A, K, M)
        self.U1, self.W2 = new(n, A, M, E), new(n, A, J, F)
        self.state = self.U1[0], self.W2[0]
        self.start(*state)
        X2bar, X2 = self.X2s.split(K, 2)

        def per(x):
            return list(x) if n == N else list(x) * N

        self.mini_batches = each(
            qx=self.qx_NA2KE,
            step=self.step_NAKE,
            rate=self.rate_NAK1,
            u=self.u_NAKF,
            eta=self.eta_NAKK,
            P=self.P_NAKK,
            S2=self.S2_NAKK,
            P2=self.P2_NAKK,
            Z=self.Z_NAKF,
            Zbar=self.Zbar_NAKF,
            G2=self.G_NAKF,
            step2=self.step2_NAKF,
            U1=per(self.U1),
            U1T=per(self.U1.mT),
            W2=per(self.W2),
            W2T=per(self.W2[:, :, :M].mT),
            X2=per(X2),
            X2T=per(X2.mT),
            X2_M=per(X2[..., :M]),
            X2bar=per(X2bar),
            X2bar_M=per(X2bar[..., :M]),
            dgelu=per(self.dgelu),
            G1=per(self.G1),
            G1T=per(self.G1.mT),
        )
        if d_state is not None:
            self.allocate_backward(d_state)

    def allocate_backward(self, d_state):
        N, A, K, E = self.x_NAKE.shape
        M, F, J = self.M, self.shape[-1], self.X2s.shape[-1]
        new, zeros = self.u_NAKF.new_empty, self.u_NAKF.new_zeros
        self.dU1_AME, self.dW2_AJF = d_state
        self.dgelu_bar, self.Hd2gelu = new(2, N, A, K, M)
        self.dgelu_exact = self.dgelu if self.inner is self.exact else new(N, A, K, M)
        self.dX2bar_AKM, self.dX2_AKM = new(2, A, K, M)
        self.dG1_AKM = zeros(A, K, M)
        self.dZ1s_A2KM = new(A, 2 * K, M)  # dZ1bar's rows, then dZ1's
        self.dH_AKJ = zeros(A, K, J)
        self.dS1_NAKK = zeros(N, A, K, K)
        self.GdW1_NAKE, self.Y2_NAKF = new(N, A, K, E), new(N, A, K, F)
        X2bar, X2 = self.X2s.split(K, 2)
        self.backward_mini_batches = each(
            qx=self.qx_NA2KE,
            step=self.step_NAKE,
            rate=self.rate_NAK1,
            PT=self.P_NAKK.mT,
            U1_F=self.U1[..., :F],
            W2=self.W2,
            W2T=self.W2[:, :, :M].mT,
            X2=X2,
            X2_M=X2[..., :M],
            X2bar_M=X2bar[..., :M],
            X2sT=self.X2s.mT,
            G1=self.G1,
            G1T=self.G1.mT,
            G2=self.G_NAKF,
            step2=self.step2_NAKF,
            dgelu=self.dgelu,
            dgelu_exact=self.dgelu_exact,
            dgelu_bar=self.dgelu_bar,
            Hd2gelu=self.Hd2gelu,
            dS2=self.dS_NAKK,
            dS2T=self.dS_NAKK.mT,
            dP1=self.dS1_NAKK,
            dG=self.dG_NAKF,
            dZbar=self.dZbar_NAKF,
            dZ=self.dZ_NAKF,
            dZZ=self.dZZ_NA2KF,
            GdW1=self.GdW1_NAKE,
            Y2=self.Y2_NAKF,
            dq=self.dq_NAKF,
            dx=self.dx_NAKF,
        )

    def start(self, U1_AME, W2_AJF):
        self.U1[0], self.W2[0] = U1_AME, W2_AJF

    def forward(self):
        for m in self.mini_batches:
            torch.bmm(m.qx, m.U1T, out=self.Z1s_A2KM)
            self.exact.gate(self.Z1_AKM, out=self.gate_AKM)
            torch.mul(self.Z1_AKM, self.gate_AKM, out=m.X2_M)
            torch.bmm(m.X2, m.W2, out=m.Z)
            G2 = self.inner_gradient(m.Z, m.u)
            torch.bmm(G2, m.W2T, out=self.H_AKM)
            self.inner_derivative(m)
            torch.mul(self.H_AKM, m.dgelu, out=m.G1)
            self.respond(m)
            torch.mul(m.eta, torch.bmm(m.X2bar, m.X2T, out=m.S2), out=m.P2)
            torch.bmm(m.X2bar, m.W2, out=m.Zbar).baddbmm_(m.P2, G2, alpha=-1)
            m.U1.baddbmm_(m.G1T, m.step)
            m.W2.baddbmm_(m.X2T, torch.mul(G2, m.rate, out=m.step2))
        return self.output()

    def inner_derivative(self, m):
        """gelu'(Z1) of the inner gradient, from the gate of Z1 and X2."""
        if self.inner is self.exact:
            value = m.X2_M
        else:
            self.inner.gate(self.Z1_AKM, out=self.gate_AKM)
            value = torch.mul(self.Z1_AKM, self.gate_AKM, out=self.scratch_AKM)
        self.inner.derivative(self.Z1_AKM, self.gate_AKM, value, out=m.dgelu)

    def respond(self, m):
        """Z1bar = q W1 - P G1 ; X2bar = gelu(Z1bar), its gate stays."""
        torch.baddbmm(self.Z1q_AKM, m.P, m.G1, alpha=-1, out=self.Z1bar_AKM)
        self.exact.gate(self.Z1bar_AKM, out=self.gate_AKM)
        torch.mul(self.Z1bar_AKM, self.gate_AKM, out=m.X2bar_M)

    def run_again(self):
        N = self.shape[0]
        exact, inner, Z1, gate, H, scratch = (
            self.exact,
            self.inner,
            self.Z1_AKM,
            self.gate_AKM,
            self.H_AKM,
            self.scratch_AKM,
        )
        torch.mul(self.G_NAKF, self.rate_NAK1, out=self.step2_NAKF)
        for i, m in enumerate(self.mini_batches):
            torch.bmm(m.qx, m.U1T, out=self.Z1s_A2KM)
            exact.gate(Z1, out=gate)
            torch.mul(Z1, gate, out=m.X2_M)
            torch.bmm(m.G2, m.W2T, out=H)
            if inner is not exact:
                exact.derivative(Z1, gate, m.X2_M, out=self.dgelu_exact[i])
            self.inner_derivative(m)
            torch.mul(H, m.dgelu, out=m.G1)
            inner.second_derivative(Z1, gate, scratch, out=self.Hd2gelu[i]).mul_(H)
            self.respond(m)
            exact.derivative(self.Z1bar_AKM, gate, m.X2bar_M, out=self.dgelu_bar[i])
            if i + 1 < N:
                torch.baddbmm(m.U1, m.G1T, m.step, out=self.U1[i + 1])
                torch.baddbmm(m.W2, m.X2T, m.step2, out=self.W2[i + 1])
        X2bar, X2 = map(flat, self.X2s.split(self.shape[3], 2))
        torch.bmm(X2bar, X2.mT, out=flat(self.S2_NAKK))
        torch.mul(self.eta_NAKK, self.S2_NAKK, out=self.P2_NAKK)

    def backward(self, d_output):
        K, F = self.shape[3:]
        self.inner_gradients()
        self.run_again()
        self.output_backward(d_output)
        self.response_backward(self.P2_NAKK, self.S2_NAKK)
        dU1, dW2, dH = self.dU1_AME, self.dW2_AJF, self.dH_AKJ
        dU1T, dW2T, dHT, dH_M = dU1.mT, dW2[:, : self.M].mT, dH.mT, dH[..., : self.M]
        dX2bar, dX2, dG1, dZ1s = self.dX2bar_AKM, self.dX2_AKM, self.dG1_AKM, self.dZ1s_A2KM
        dZ1sT, (dZ1bar, dZ1) = dZ1s.mT, dZ1s.split(K, 1)
        for m, g, norm in zip(
            reversed(self.backward_mini_batches),
            reversed(self.gradient_views),
            reversed(self.norms),
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
            self.inner_gradient_backward(g, norm)
            dX2.baddbmm_(m.dZ, m.W2T)
            torch.mul(dG1, m.Hd2gelu, out=dZ1).addcmul_(dX2, m.dgelu_exact)
            dW2.baddbmm_(m.X2sT, m.dZZ).baddbmm_(dHT, m.G2)
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
        return self.gradients(dPS, Y)
