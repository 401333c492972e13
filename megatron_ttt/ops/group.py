"""A group of consecutive mini-batches: its tokens, and what both inner models share.

A group is a workspace: its tensors are allocated once and used again for every stretch of the
sequence with as many mini-batches, and so are the per-mini-batch views that the loops run over
(in eager mode a view costs as much as a small product).

What the models share is the loss: Z, the model's output for the keys, meets the target through
LayerNorm, l = 1/2 ||gamma * LN(Z) + beta - (v - x)||^2, and out = q + gamma * LN(Zbar) + beta.

Sizes: N mini-batches, A heads (batch x head), K tokens of a mini-batch, F features,
E >= F + 1 the features, a constant 1 and zeros: with the 1 the bias is one more row of the weights,
and the zeros keep rows aligned.
"""

import torch
from torch import Tensor

from megatron_ttt.ops.layernorm import normalise, project


def aligned(width: int) -> int:
    """Room for `width` features and the 1."""
    return 4 * (width // 4 + 1)


def augment(W: Tensor, b: Tensor) -> Tensor:
    """[..., I, J] weights and [..., 1, J] bias as the rows of one matrix, by head."""
    padding = W.new_zeros(*W.shape[:-2], aligned(W.shape[-2]) - W.shape[-2] - 1, W.shape[-1])
    return torch.cat((W, b, padding), -2).flatten(0, 1)


def flat(x_NA: Tensor) -> Tensor:
    """Mini-batches and heads as one batch dimension."""
    return x_NA.flatten(0, 1)


class Group:
    def __init__(self, N, A, K, F, like):
        self.shape = N, A, K, F
        self.E = E = aligned(F)
        new = like.new_empty
        self.qx_NA2KE = like.new_zeros(N, A, 2 * K, E)
        self.qx_NA2KE[..., F] = 1
        self.q_NAKE, self.x_NAKE = self.qx_NA2KE.split(K, 2)
        self.q_NAKF, self.x_NAKF = self.q_NAKE[..., :F], self.x_NAKE[..., :F]
        self.step_NAKE = new(N, A, K, E)
        self.offset_NAKF, self.u_NAKF, self.G_NAKF = new(3, N, A, K, F)
        self.Z_NAKF, self.Zbar_NAKF = new(2, N, A, K, F)
        self.rates_NAKK, self.S_NAKK, self.P_NAKK = new(3, N, A, K, K)

    def load(self, q, k, v, lam, tau_K, gamma_A1F, beta_A1F):
        """Take the inputs ([N, B, H, K, ...], any float dtype) and do what needs no state."""
        heads = q.shape[1:3]
        self.tau_K, self.gamma_A1F, self.beta_A1F = tau_K, gamma_A1F, beta_A1F
        self.gamma2_A1F = gamma_A1F * gamma_A1F
        self.lam_NAK = lam.to(tau_K.dtype).flatten(1, 2)
        self.rate_NAK1 = (self.lam_NAK * -tau_K[-1]).unsqueeze(-1)
        self.q_NAKF.unflatten(1, heads).copy_(q)
        self.x_NAKF.unflatten(1, heads).copy_(k)
        torch.mul(self.x_NAKE, self.rate_NAK1, out=self.step_NAKE)
        offset = self.offset_NAKF
        offset.unflatten(1, heads).copy_(v)
        torch.sub(self.x_NAKF, offset, out=offset).add_(beta_A1F)
        torch.mul(gamma_A1F, offset, out=self.u_NAKF)
        torch.mul(tau_K[:, None], self.lam_NAK.unsqueeze(-2), out=self.rates_NAKK).tril_()
        torch.bmm(flat(self.q_NAKE), flat(self.x_NAKE).mT, out=flat(self.S_NAKK))
        torch.mul(self.rates_NAKK, self.S_NAKK.tril_(), out=self.P_NAKK)
        self.norms, self.gradients = [], []

    def inner_gradient(self, Z, u):
        """G = dl/dZ = Pi(u), u = gamma * (gamma * Z_hat + offset)."""
        norm = normalise(Z)
        u.addcmul_(self.gamma2_A1F, norm.hat)
        G = project(u, norm)
        self.norms.append(norm)
        self.gradients.append(G)
        return G

    def answer(self):
        """out = q + gamma * LN(Zbar) + beta."""
        out = torch.add(self.q_NAKF, self.beta_A1F)
        return out.addcmul_(self.gamma_A1F, normalise(self.Zbar_NAKF).hat)

    def prepare_backward(self):
        """Allocate what only the backward needs."""
        N, A, K, F = self.shape
        new = self.u_NAKF.new_empty
        self.dZZ_NA2KF = new(N, A, 2 * K, F)  # dZbar's rows, then dZ's
        self.dZbar_NAKF, self.dZ_NAKF = self.dZZ_NA2KF.split(K, 2)
        self.hat_NAKF, self.dq_NAKF, self.dx_NAKF, self.t_NAKF = new(4, N, A, K, F)
        self.D_NAKF = new(N, A, K, F)
        self.dS_NAKK = self.u_NAKF.new_zeros(N, A, K, K)
        self.t_AKF = new(A, K, F)

    def answer_backward(self, d_out):
        """Section 7, step 1: from d_out [N, B, H, K, F] to dZbar; d_out becomes the first of dq."""
        dq, gamma = self.dq_NAKF, self.gamma_A1F
        dq.unflatten(1, d_out.shape[1:3]).copy_(d_out)
        bar = normalise(self.Zbar_NAKF)
        self.dZbar_NAKF.copy_(project(torch.mul(gamma, dq, out=self.t_NAKF), bar))
        self.dgamma_AF = bar.hat.mul_(dq).sum((0, 2))
        self.dbeta_AF = dq.sum((0, 2))

    def prepare_gradient_backward(self):
        F = self.shape[-1]
        hat = torch.stack([norm.hat for norm in self.norms], out=self.hat_NAKF)
        self.scale_NAK1 = torch.stack([norm.rstd for norm in self.norms]).mul_(-1 / F)
        uZ = torch.mul(self.u_NAKF, hat, out=self.t_NAKF).sum(-1, keepdim=True)
        self.h_NAK1 = uZ.mul_(self.scale_NAK1)
        self.dus = []

    def gradient_backward(self, norm, G, h, scale, D, dZ):
        """Section 7, step 4: from D = dG to dZ, through G = Pi(u).

        With du = Pi(D) and Pi linear, the section's formulas become
        dZ = Pi(gamma^2 du - mean(u Z_hat)/s D) - (mean(D Z_hat) G + mean(D G) Z_hat) / s.
        """
        hat, t = norm.hat, self.t_AKF
        DZ = torch.mul(D, hat, out=t).sum(-1, keepdim=True)
        DG = torch.mul(D, G, out=t).sum(-1, keepdim=True)
        du = project(D, norm)
        torch.mul(self.gamma2_A1F, du, out=t).addcmul_(h, D)
        first = project(t, norm)
        torch.mul(DG, hat, out=t).addcmul_(DZ, G)
        torch.addcmul(first, scale, t, out=dZ)
        self.dus.append(du)

    def target_backward(self):
        """The rest of step 4: dv, and what reaches gamma, beta and x through the target."""
        gamma, du = self.gamma_A1F, self.t_NAKF
        torch.stack(self.dus[::-1], out=du)
        residual = self.offset_NAKF.addcmul_(gamma, self.hat_NAKF, value=2)
        self.dgamma_AF += residual.mul_(du).sum((0, 2))
        du *= gamma
        self.dbeta_AF += du.sum((0, 2))
        self.dx_NAKF += du
        return du.neg_()

    def rates_backward(self, dPS_NAKK, Y):
        """dlam and dtau from P (dP * S, step 2) and from the update (Y = sum Y_j . G_j, step 3)."""
        tau_K, lam_NAK = self.tau_K, self.lam_NAK
        dtau_K = (dPS_NAKK @ lam_NAK.unsqueeze(-1)).sum((0, 1)).squeeze(-1)
        dtau_K[-1] -= (Y * lam_NAK).sum()
        return (tau_K @ dPS_NAKK).addcmul_(Y, tau_K[-1], value=-1), dtau_K
