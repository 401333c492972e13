import torch

from megatron_ttt.ops.layernorm import normalise, project


def flat(x):
    return x.flatten(0, 1)


class LinearGroup:
    SIZE = 8

    @staticmethod
    def pack(W, b):
        return (torch.cat((W, b), -2).flatten(0, 1),)

    @staticmethod
    def unpack(W_AEF, B, H):
        W = W_AEF.unflatten(0, (B, H))
        return W[..., :-1, :].contiguous(), W[..., -1:, :].contiguous()

    def __init__(self, N, A, K, F, M, like):
        E = F + 1
        self.shape = N, A, K, F
        new = like.new_empty
        self.qx_NA2KE = new(N, A, 2 * K, E)
        self.qx_NA2KE[..., F] = 1
        self.q_NAKE, self.x_NAKE = self.qx_NA2KE.split(K, 2)
        self.offset_NAKF = new(N, A, K, F)
        self.u_NAKF = new(N, A, K, F)
        self.Z_NAKF = new(N, A, K, F)
        self.G_NAKF = new(N, A, K, F)
        self.step_NAKE = new(N, A, K, E)
        self.W_NAEF = new(N + 1, A, E, F)
        self.rates_NAKK, self.S_NAKK, self.P_NAKK = new(3, N, A, K, K)
        self.Zbar_NAKF = new(N, A, K, F)
        self.forward_views = list(zip(
            self.x_NAKE, self.u_NAKF, self.step_NAKE.mT, self.Z_NAKF, self.W_NAEF, self.W_NAEF[1:]
        ))

    def prepare_backward(self):
        N, A, K, F = self.shape
        E = F + 1
        new = self.u_NAKF.new_empty
        self.hG_NA2KF = new(N, A, 2, K, F)
        self.h_NAK1 = new(N, A, K, 1)
        self.scale_NA1K1 = new(N, A, 1, K, 1)
        self.dZZ_NA2KF = new(N, A, 2 * K, F)
        self.dW_NAEF = new(N + 1, A, E, F)
        self.D0_NAKF = new(N, A, K, F)
        self.D_AKF = new(A, K, F)
        self.T_AKF = new(A, K, F)
        self.prod_A2KF = new(A, 2, K, F)
        self.ce_A2K1 = new(A, 2, K, 1)
        self.dP_NAKK, self.dS_NAKK = new(2, N, A, K, K)
        self.dq_NAKF, self.dx_NAKF, self.t_NAKF, self.du_NAKF = new(4, N, A, K, F)
        self.R_NAKE = new(N, A, K, E)
        self.backward_views = list(zip(
            self.step_NAKE, self.D0_NAKF, self.hG_NA2KF, self.hG_NA2KF[:, :, 0], self.hG_NA2KF[:, :, 1],
            self.h_NAK1, self.scale_NA1K1, self.qx_NA2KE.mT, self.dZZ_NA2KF, self.dZZ_NA2KF[:, :, K:],
            self.dW_NAEF, self.dW_NAEF[1:],
        ))

    def load(self, q, k, v, lam, tau, gamma, beta):
        N, A, K, F = self.shape
        heads = q.shape[1:3]
        self.q_NAKE.unflatten(1, heads)[..., :F] = q
        self.x_NAKE.unflatten(1, heads)[..., :F] = k
        torch.sub(self.x_NAKE.unflatten(1, heads)[..., :F], v, out=self.offset_NAKF.unflatten(1, heads))
        self.lam_NAK = lam.flatten(1, 2)
        self.tau, self.gamma, self.beta = tau, gamma, beta
        self.offset_NAKF += beta
        torch.mul(gamma, self.offset_NAKF, out=self.u_NAKF)
        self.gg = gamma * gamma
        torch.mul(self.x_NAKE, (self.lam_NAK * -tau[-1]).unsqueeze(-1), out=self.step_NAKE)

    def run(self, W_AEF):
        self.W_NAEF[0] = W_AEF
        norms, Gs = [], []
        gg = self.gg
        for x, u, stepT, Z, W, W_next in self.forward_views:
            torch.bmm(x, W, out=Z)
            norm = normalise(Z)
            u.addcmul_(gg, norm.hat)
            G = project(u, norm)
            torch.baddbmm(W, stepT, G, out=W_next)
            norms.append(norm)
            Gs.append(G)
        torch.stack(Gs, out=self.G_NAKF)
        q, x = flat(self.q_NAKE), flat(self.x_NAKE)
        torch.mul(self.tau[:, None], self.lam_NAK.unsqueeze(-2), out=self.rates_NAKK)
        self.rates_NAKK.tril_()
        torch.bmm(q, x.mT, out=flat(self.S_NAKK))
        torch.mul(self.rates_NAKK, self.S_NAKK, out=self.P_NAKK)
        Zbar = flat(self.Zbar_NAKF)
        torch.bmm(q, flat(self.W_NAEF[:-1]), out=Zbar)
        Zbar.baddbmm_(flat(self.P_NAKK), flat(self.G_NAKF), alpha=-1)
        return norms, normalise(self.Zbar_NAKF)

    def forward(self, packed):
        (W_AEF,) = packed
        _, bar = self.run(W_AEF)
        out = torch.add(self.q_NAKE[..., :-1], self.beta, out=self.Zbar_NAKF)
        out.addcmul_(bar.hat, self.gamma)
        return out, (self.W_NAEF[-1],)

    def backward(self, packed, d_out, d_packed):
        N, A, K, F = self.shape
        (W_AEF,), (dW_AEF,) = packed, d_packed
        norms, bar = self.run(W_AEF)
        q, x, lam, tau, gamma, gg = self.q_NAKE, self.x_NAKE, self.lam_NAK, self.tau, self.gamma, self.gg
        hat, G = self.hG_NA2KF.unbind(2)
        G.copy_(self.G_NAKF)
        torch.stack([n.hat for n in norms], out=hat)
        # step 1
        d_out_ = d_out
        d_out = self.dq_NAKF
        d_out.unflatten(1, d_out_.shape[1:3]).copy_(d_out_)
        t = torch.mul(gamma, d_out, out=self.t_NAKF)
        dZbar = project(t, bar)
        self.dZZ_NA2KF[:, :, :K] = dZbar
        dgamma = torch.mul(d_out, bar.hat, out=t).sum((0, 2))
        dbeta = d_out.sum((0, 2))
        # step 2
        dP = self.dP_NAKK
        torch.bmm(flat(dZbar), flat(G).mT, out=flat(dP))
        dP.neg_().tril_()
        dS = torch.mul(dP, self.rates_NAKK, out=self.dS_NAKK)
        D0 = self.D0_NAKF
        torch.bmm(flat(self.P_NAKK).mT, flat(dZbar), out=flat(D0))
        D0.neg_()
        dP *= self.S_NAKK
        dlam = tau @ dP
        dtau = torch.matmul(dP, lam.unsqueeze(-1)).sum((0, 1))[:, 0]
        # second order constants
        rstd = torch.stack([n.rstd for n in norms])
        scale = rstd * (-1 / F)
        self.scale_NA1K1[:, :, 0] = scale
        torch.mul(torch.mul(self.u_NAKF, hat, out=t).sum(-1, keepdim=True), scale, out=self.h_NAK1)
        self.dW_NAEF[N] = dW_AEF
        dus = []
        D, T, prod, ce = self.D_AKF, self.T_AKF, self.prod_A2KF, self.ce_A2K1
        D_A1KF = D.unsqueeze(1)
        c, e = ce.unbind(1)
        for norm, views in zip(reversed(norms), reversed(self.backward_views)):
            step, D0_i, hG, hat_i, G_i, h, scale_i, qxT, dZZ, dZx, dW, dW_next = views
            torch.baddbmm(D0_i, step, dW_next, out=D)
            du = project(D, norm)
            torch.mul(D_A1KF, hG, out=prod)
            torch.sum(prod, -1, keepdim=True, out=ce)
            ce.mul_(scale_i)
            torch.mul(gg, du, out=T)
            T.addcmul_(D, h)
            dZ = project(T, norm)
            dZ.addcmul_(e, hat_i)
            torch.addcmul(dZ, c, G_i, out=dZx)
            torch.baddbmm(dW_next, qxT, dZZ, out=dW)
            dus.append(du)
        dus.reverse()
        du = torch.stack(dus, out=self.du_NAKF)
        Wt = flat(self.W_NAEF[:N, :, :F]).mT
        dq = flat(self.dq_NAKF)
        dq.baddbmm_(flat(dZbar), Wt).baddbmm_(flat(dS), flat(x)[..., :F])
        dx = flat(self.dx_NAKF)
        torch.bmm(flat(dS).mT, flat(q)[..., :F], out=dx)
        dx.baddbmm_(flat(self.dZZ_NA2KF[:, :, K:]), Wt)
        dx = self.dx_NAKF
        R = self.R_NAKE
        torch.bmm(flat(G), flat(self.dW_NAEF[1:]).mT, out=flat(R))
        rate = (lam * -tau[-1]).unsqueeze(-1)
        dx.addcmul_(R[..., :F], rate)
        R *= x
        YG = R.sum(-1)
        dlam.sub_(YG * tau[-1])
        dtau[-1] -= (YG * lam).sum()
        self.offset_NAKF.addcmul_(hat, gamma, value=2)
        dgamma += self.offset_NAKF.mul_(du).sum((0, 2))
        du *= gamma
        dx += du
        dv = du.neg_()
        dbeta -= dv.sum((0, 2))
        return (self.dq_NAKF, dx, dv, dlam, dtau, dgamma, dbeta), (self.dW_NAEF[0],)
