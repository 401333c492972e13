"""TTT-MLP over a group of mini-batches, forward and backward (arXiv 2407.04620, section 2).

A state is 32 times as large as a mini-batch's tokens and a hidden layer four times, so it pays to
do everything with a mini-batch's hidden layers and state while they are in cache. The forward
steps one state in place and keeps Z1 and Z1bar, the hidden layers before their GELU; the backward
starts from the state after the group and takes the steps back, in place too. Where the state grew
so much in the group that this would lose it (`grew`), the backward takes the steps forwards again
from the state before the group, and holds all its states. On a GPU it always does: there the host
would have to wait to know.

Sizes beside those of `../workspace.py`: M hidden width, J > M the hidden units, a constant 1 and
zeros. The backward holds its state transposed, [M, E] and [F, J]: MKL is slow at [K, M] times the
transpose of [E, M], and of the products there most are with the transposed state.
"""

import torch

from megatron_ttt.mixers.ttt.mlp.gelu import EXACT, ROUNDED, Gelu
from megatron_ttt.mixers.ttt.workspace import (
    MiniBatchWorkspace,
    append_bias,
    grew,
    merge_batch,
    per_mini_batch,
)


class MLPWorkspace(MiniBatchWorkspace):
    SIZE = 16

    @staticmethod
    def pack(W1, b1, W2, b2):
        return append_bias(W1, b1), append_bias(W2, b2)

    @staticmethod
    def unpack(W1_AEM, W2_AJF):
        F, M = W2_AJF.shape[2], W1_AEM.shape[2]
        return W1_AEM[:, :F], W1_AEM[:, F : F + 1], W2_AJF[:, :M], W2_AJF[:, M : M + 1]

    def __init__(self, shape, state, d_state=None):
        W1_AEM, W2_AJF = state
        super().__init__(shape, W1_AEM, for_backward=d_state is not None)
        self.exact = Gelu(EXACT, W1_AEM)
        # The constant of the inner gradient's gelu', see `gelu.py`.
        self.inner = Gelu(ROUNDED, W1_AEM) if W1_AEM.dtype == torch.float64 else self.exact
        if d_state is None:
            self.allocate_forward(W1_AEM, W2_AJF)
        else:
            self.allocate_backward(W1_AEM, W2_AJF, *d_state)

    def hidden(self, rows: int, width: int):
        """Room for `rows` hidden layers of a mini-batch: [A, rows, J] and its first [.., M]."""
        _, A, K, _ = self.x_NAKE.shape
        X_J = self.new(A, rows * K, width).zero_()
        X_J[:, : 2 * K, self.M] = 1
        return X_J, X_J[..., : self.M]

    def allocate_forward(self, W1_AEM, W2_AJF):
        _, A, K, _ = self.x_NAKE.shape
        self.M, J = W1_AEM.shape[2], W2_AJF.shape[1]
        self.W1, self.W2 = self.state = torch.empty_like(W1_AEM), torch.empty_like(W2_AJF)
        self.W2T_M = self.W2[:, : self.M].mT
        X2s, _ = self.hidden(2, J)
        self.X2, self.X2bar = X2s.split(K, 1)
        self.X2_M, self.X2bar_M = (x[..., : self.M] for x in (self.X2, self.X2bar))
        self.gate, self.H, self.dgelu, self.scratch = self.new(4, A, K, self.M)
        self.P2 = self.new(A, K, K)
        self.step2 = self.new(A, K, W2_AJF.shape[2])
        self.mini_batches = per_mini_batch(
            xq=self.xq_NA2KE,
            stepT=self.step_NAKE.mT,
            rate=self.rate_NAK1,
            u=self.u_NAKF,
            eta=self.eta_NAKK,
            P=self.P_NAKK,
        )

    def start(self, W1_AEM, W2_AJF):
        for W, given in zip(self.state, (W1_AEM, W2_AJF)):
            W.copy_(given)

    def forward(self, output):
        N, A, K, _ = self.x_NAKE.shape
        Z_NAKF, Zbar_NAKF = self.keep(2, *self.G_NAKF.shape)
        Z1s_NA2KM, S2_NAKK = self.keep(N, A, 2 * K, self.M), self.keep(N, A, K, K)
        kept = per_mini_batch(
            Z=Z_NAKF,
            Zbar=Zbar_NAKF,
            Z1s=Z1s_NA2KM,
            Z1=Z1s_NA2KM[:, :, :K],
            Z1bar=Z1s_NA2KM[:, :, K:],
            S2=S2_NAKK,
        )
        exact, gate, H, W1, W2 = self.exact, self.gate, self.H, self.W1, self.W2
        X2T, X2bar = self.X2.mT, self.X2bar
        for m, z in zip(self.mini_batches, kept):
            torch.bmm(m.xq, W1, out=z.Z1s)
            torch.mul(z.Z1, exact.gate(z.Z1, out=gate), out=self.X2_M)
            torch.bmm(self.X2, W2, out=z.Z)
            G2 = self.inner_gradient(z.Z, m.u)
            torch.bmm(G2, self.W2T_M, out=H)
            G1 = H.mul_(self.inner_derivative(z.Z1, gate, self.X2_M, out=self.dgelu))
            z.Z1bar.sub_(torch.bmm(m.P, G1, out=self.scratch))
            torch.mul(z.Z1bar, exact.gate(z.Z1bar, out=gate), out=self.X2bar_M)
            torch.mul(torch.bmm(X2bar, X2T, out=z.S2), m.eta, out=self.P2)
            torch.bmm(X2bar, W2, out=z.Zbar).baddbmm_(self.P2, G2, alpha=-1)
            W2.baddbmm_(X2T, torch.mul(G2, m.rate, out=self.step2))
            W1.baddbmm_(m.stepT, G1)
        after = (self.keep(*W.shape).copy_(W) for W in self.state)
        statistics_4NAK1 = self.write_output(Zbar_NAKF, output)
        self.kept = *after, Z1s_NA2KM, S2_NAKK, Z_NAKF, Zbar_NAKF, statistics_4NAK1

    def inner_derivative(self, Z1, gate, X2, out):
        """gelu'(Z1) of the inner gradient; `gate` and `X2` are Z1's, and may be overwritten."""
        if self.inner is not self.exact:
            X2 = Z1 * self.inner.gate(Z1, out=gate)
        return self.inner.derivative(Z1, gate, X2, out=out)

    def allocate_backward(self, W1_AEM, W2_AJF, dW1_AEM, dW2_AJF):
        N, A, K, E = self.x_NAKE.shape
        (_, J, F), M = W2_AJF.shape, W1_AEM.shape[2]
        self.M, new = M, self.new
        self.dW1, self.dW2 = dW1_AEM, dW2_AJF
        self.W1T, self.W2T = new(A, M, E), new(A, F, J)
        self.state = self.W1T.mT, self.W2T.mT
        self.X2s, X2s_M = self.hidden(3, J)  # X2, X2bar, dH
        self.gelus_M = X2s_M[:, : 2 * K]
        self.gates, self.dgelus = new(2, A, 2 * K, M)
        self.gate = self.gates[:, :K]
        self.d2gelu, self.dG1, self.dX2 = new(3, A, K, M)
        self.dgelu_inner = self.dgelus[:, :K] if self.inner is self.exact else new(A, K, M)
        self.dP1_NAKK, self.dS2_NAKK, self.P2_NAKK = new(3, N, A, K, K)
        self.GdW1_NAEK, self.Y2_NAKF, self.step2_NAKF = (
            new(N, A, E, K),
            new(N, A, K, F),
            new(N, A, K, F),
        )
        self.mini_batches = per_mini_batch(
            xqT=self.xq_NA2KE.mT,
            step=self.step_NAKE,
            step2=self.step2_NAKF,
            step2T=self.step2_NAKF.mT,
            rate=self.rate_NAK1,
            PT=self.P_NAKK.mT,
            dP1=self.dP1_NAKK,
            dS2=self.dS2_NAKK,
            dS2T=self.dS2_NAKK.mT,
            G=self.G_NAKF,
            dG=self.dG_NAKF,
            dZ=self.dZ_NAKF,
            dZbarG=self.dZs_NA3KF[:, :, K:],
            dZs=self.dZs_NA3KF,
            dxq=self.dxq_NA2KF,
            GdW1=self.GdW1_NAEK,
            Y2=self.Y2_NAKF,
        )

    def restore(self, before, W1_AEM, W2_AJF, Z1s_NA2KM, S2_NAKK, *outputs):
        after = W1_AEM, W2_AJF
        weights = self.unpack(*before)[::2]
        self.forwards = W1_AEM.device.type != "cpu" or grew(weights, after)
        self.start(*(before if self.forwards else after))
        self.restore_norms(*outputs)
        self.Z1s_NA2KM, self.Z1_NAKM = Z1s_NA2KM, Z1s_NA2KM[:, :, : self.shape[3]]
        self.S2_NAKK = S2_NAKK

    def backward(self, d_output, d_tokens):
        K, F = self.shape[3:]
        self.inner_gradients()
        self.output_backward(d_output)
        torch.mul(self.G_NAKF, self.rate_NAK1, out=self.step2_NAKF)
        torch.mul(self.dP_NAKK, self.eta_NAKK, out=self.dS2_NAKK)
        P2T = merge_batch(torch.mul(self.S2_NAKK, self.eta_NAKK, out=self.P2_NAKK)).mT
        merge_batch(self.dG_NAKF).baddbmm_(P2T, merge_batch(self.dZbar_NAKF), beta=0, alpha=-1)

        M, W1T, W2T, dW1, dW2 = self.M, self.W1T, self.W2T, self.dW1, self.dW2
        W1T_F, W2T_M, W2 = W1T[:, :, :F], W2T[:, :, :M], W2T.mT
        states = self.states() if self.forwards else None
        dW2T_M = dW2[:, :M].mT
        X2, X2bar, dH = self.X2s.split(K, 1)
        X2_M, X2bar_M, dH_M = (x[..., :M] for x in (X2, X2bar, dH))
        X2sT = self.X2s.mT
        # For the cache's sake few buffers: once the gates have served they make way for dX2bar and
        # H, which becomes G1, and the derivatives become dZ1 and dZ1bar.
        dX2barH, dZ1s = self.gates, self.dgelus
        dX2bar, H = dX2barH.split(K, 1)
        G1T = H.mT
        dZ1, dZ1bar = dZ1s.split(K, 1)
        dG1, dX2, d2gelu = self.dG1, self.dX2, self.d2gelu
        for m, hessian, Z1s, Z1 in zip(
            reversed(self.mini_batches),
            reversed(self.hessians),
            reversed(self.Z1s_NA2KM.unbind()),
            reversed(self.Z1_NAKM.unbind()),
        ):
            self.gelus(Z1s, Z1)
            if states is None:
                W2T.baddbmm_(m.step2T, X2, alpha=-1)
            else:
                W1T, W2T = states.pop()
                W1T_F, W2T_M, W2 = W1T[:, :, :F], W2T[:, :, :M], W2T.mT
            torch.bmm(m.dZbarG, W2T_M, out=dX2barH)
            d2gelu.mul_(H)
            H.mul_(self.dgelu_inner)  # G1
            dZ1bar.mul_(torch.bmm(m.dS2, X2_M, out=dX2).add_(dX2bar))
            m.dP1.baddbmm_(dZ1bar, G1T, beta=0, alpha=-1)
            dG1.baddbmm_(m.PT, dZ1bar, beta=0, alpha=-1).baddbmm_(m.step, dW1)
            torch.bmm(dW1, G1T, out=m.GdW1)
            torch.bmm(m.dS2T, X2bar_M, out=dX2).baddbmm_(m.step2, dW2T_M)
            torch.bmm(X2, dW2, out=m.Y2)
            torch.mul(dG1, self.dgelu_inner, out=dH_M)
            m.dG.addcmul_(m.rate, m.Y2).baddbmm_(dH, W2)
            self.inner_gradient_backward(hessian)
            dX2.baddbmm_(m.dZ, W2T_M)
            dZ1.mul_(dX2).addcmul_(dG1, d2gelu)
            dW2.baddbmm_(X2sT, m.dZs)
            dW1.baddbmm_(m.xqT, dZ1s)
            if states is None:
                W1T.baddbmm_(G1T, m.step, alpha=-1)
            torch.bmm(dZ1s, W1T_F, out=m.dxq)

        dPS = self.dP_NAKK.mul_(self.S2_NAKK).addcmul_(self.S_NAKK, self.dP1_NAKK)
        self.similarity_backward(self.dP1_NAKK.mul_(self.eta_NAKK))
        GdW1 = self.GdW1_NAEK
        self.dx_NAKF.addcmul_(self.rate_NAK1, GdW1[:, :, :F].mT)
        Y = GdW1.mul_(self.x_NAKE.mT).sum(-2) + self.Y2_NAKF.mul_(self.G_NAKF).sum(-1)
        return self.gradients(dPS, Y, d_output, d_tokens)

    def states(self):
        """W1T and W2T before each mini-batch, from those before the first."""
        W1T, W2T = self.W1T, self.W2T
        M, Z1_NAKM = self.M, self.Z1_NAKM
        gate, slopes = torch.empty_like(Z1_NAKM), torch.empty_like(Z1_NAKM)
        X2_NAKJ = self.new(*Z1_NAKM.shape[:3], W2T.shape[2]).zero_()
        X2_NAKJ[..., M] = 1
        X2_NAKM = torch.mul(Z1_NAKM, self.exact.gate(Z1_NAKM, out=gate), out=X2_NAKJ[..., :M])
        self.inner_derivative(Z1_NAKM, gate, X2_NAKM, out=slopes)
        states = [(W1T, W2T)]
        for m, X2, slope in zip(self.mini_batches[:-1], X2_NAKJ, slopes):
            G1T = torch.bmm(m.G, W2T[:, :, :M]).mul_(slope).mT
            W1T, W2T = torch.baddbmm(W1T, G1T, m.step), torch.baddbmm(W2T, m.step2T, X2)
            states.append((W1T, W2T))
        return states

    def gelus(self, Z1s, Z1):
        """X2 and X2bar, their derivatives, and of Z1 the inner gradient's two derivatives."""
        exact, inner, gates, gelus_M = self.exact, self.inner, self.gates, self.gelus_M
        torch.mul(Z1s, exact.gate(Z1s, out=gates), out=gelus_M)
        exact.derivative(Z1s, gates, gelus_M, out=self.dgelus)
        if inner is not exact:
            X2 = gelus_M[:, : Z1.shape[1]]
            self.inner_derivative(Z1, self.gate, X2, out=self.dgelu_inner)
        inner.second_derivative(Z1, self.gate, self.dG1, out=self.d2gelu)
