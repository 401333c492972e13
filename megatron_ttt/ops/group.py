"""A group of consecutive mini-batches: its tokens, and what both inner models share.

A group is a workspace. Its tensors are allocated once and used again for every stretch of the
sequence with as many mini-batches, and so are the views that the loops over mini-batches run on:
in eager mode a view costs as much as a small product. Only what the backward wants back of each
stretch (`kept`) is allocated for it. All runs in inference mode: autograd's bookkeeping, of which
nothing here has any use, would cost some percent of the time.

The models share the loss. Z, a model's output for the keys, meets the target through LayerNorm,
l = 1/2 ||gamma LN(Z) + offset||^2 with offset = beta - (v - x); Zbar, its output for the queries
after the inner step, gives out = q + gamma LN(Zbar) + beta.

Sizes: N mini-batches, B batch, H heads, A = B * H, K tokens of a mini-batch, F features, and
E > F the features, a constant 1 and zeros: with the 1 the bias is one more row of the weights, the
+1 of S = q x^T + 1 comes by itself, and the zeros align the rows. 2K and 3K are rows of several
kinds one after the other, so that one product serves them all: x and q; dZ, dZbar and G.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_ttt.ops.layernorm import Normalised, normalise, project


def augmented(width: int) -> int:
    """Room for `width` features, the 1, and zeros up to a multiple of 8."""
    return 8 * (width // 8 + 1)


def augment(W: Tensor, b: Tensor) -> Tensor:
    """Weights [B, H, I, J] over the bias [B, H, 1, J] over zeros, as [A, I + 1.., J]."""
    zeros = augmented(W.shape[-2]) - W.shape[-2] - 1
    return torch.nn.functional.pad(torch.cat((W, b), -2), (0, 0, 0, zeros)).flatten(0, 1)


def flat(x_NA: Tensor) -> Tensor:
    """Mini-batches and heads as one batch dimension."""
    return x_NA.flatten(0, 1)


def each(**tensors) -> list[SimpleNamespace]:
    """One namespace of views per mini-batch."""
    return [SimpleNamespace(**dict(zip(tensors, views))) for views in zip(*tensors.values())]


class Group:
    """What does not depend on the inner model. `shape` is [N, B, H, K, F]; `like` gives dtype and
    device. The subclasses add

    - pack, unpack: between the state as its users know it and as the loops do,
    - state: tensors stepped by `forward`, and `start`, which sets them,
    - forward(output): fills it; leaves in `kept` what `restore` gives a group before its backward,
    - backward(d_output, d_tokens): fills the gradients of q, k, v and lam, returns those of tau,
      gamma and beta; takes the state's gradient, given on construction, from after the group to
      before it.

    Tokens from outside are views [N, B, H, K, ...] of any float dtype.
    """

    def __init__(self, shape: torch.Size, like: Tensor, for_backward: bool):
        self.shape = shape
        N, B, H, K, F = shape
        A, E = B * H, augmented(F)
        new = self.new = like.new_empty
        self.xq_NA2KE = like.new_zeros(N, A, 2 * K, E)
        self.xq_NA2KE[..., F] = 1
        self.x_NAKE, self.q_NAKE = self.xq_NA2KE.split(K, 2)
        self.x_NAKF, self.q_NAKF = self.x_NAKE[..., :F], self.q_NAKE[..., :F]
        self.rate_NAK1, self.step_NAKE = new(N, A, K, 1), new(N, A, K, E)
        self.residual_NAKF, self.u_NAKF = new(2, N, A, K, F)
        self.eta_NAKK, self.S_NAKK, self.P_NAKK = new(3, N, A, K, K)
        if not for_backward:
            self.G_NAKF = new(N, A, K, F)
            return
        self.dZs_NA3KF = new(N, A, 3 * K, F)
        self.dZ_NAKF, self.dZbar_NAKF, self.G_NAKF = self.dZs_NA3KF.split(K, 2)
        self.dxq_NA2KF = new(N, A, 2 * K, F)
        self.dx_NAKF, self.dq_NAKF = self.dxq_NA2KF.split(K, 2)
        self.dG_NAKF, self.du_NAKF, self.scratch_NAKF = new(3, N, A, K, F)
        self.dP_NAKK = new(N, A, K, K)
        self.dSS_NA2K2K = like.new_zeros(N, A, 2 * K, 2 * K)
        self.hG1_NA3KF = like.new_ones(N, A, 3, K, F)  # Z_hat, G, 1
        self.hG_NA2KF = self.hG1_NA3KF[:, :, :2]
        self.h_NAK1, self.rstd_NAK1 = new(2, N, A, K, 1)
        self.scale_NA1K1 = new(N, A, 1, K, 1)
        self.scratch_AKF, self.scratch_A3KF = new(A, K, F), new(A, 3, K, F)
        self.dots_A3K1 = new(A, 3, K, 1)
        self.gradient_views = each(
            dG=self.dG_NAKF,
            dG_A1KF=self.dG_NAKF.unsqueeze(2),
            h=self.h_NAK1,
            hG1=self.hG1_NA3KF,
            rstd=self.rstd_NAK1,
            scale=self.scale_NA1K1,
            du=self.du_NAKF,
            hat=self.hG_NA2KF[:, :, 0],
            G=self.hG_NA2KF[:, :, 1],
            dZ=self.dZ_NAKF,
        )

    def keep(self, *shape: int) -> Tensor:
        """A new tensor for `kept`: unlike the workspace it may be saved for the backward."""
        with torch.inference_mode(False):
            return self.new(shape)

    def by_head(self, x_NA: Tensor) -> Tensor:
        """[N, A, ...] as [N, B, H, ...]."""
        return x_NA.unflatten(1, self.shape[1:3])

    def of_heads(self, x_A: Tensor) -> Tensor:
        """[A, ...] as [B, H, ...]."""
        return x_A.unflatten(0, self.shape[1:3])

    def load(self, q, k, v, lam, tau_K, gamma_A1F, beta_A1F):
        """Take a stretch of tokens; do what needs no state."""
        K = self.shape[3]
        # The step the state takes is W' = W + step^T G. After a ragged mini-batch it takes none.
        self.tau_step = tau_K[-1] * (len(tau_K) == K)
        self.tau_K, self.gamma_A1F, self.beta_A1F = tau_K, gamma_A1F, beta_A1F
        self.gamma2_A1F = gamma_A1F * gamma_A1F
        self.lam_NAK = lam.to(tau_K.dtype).flatten(1, 2)
        self.by_head(self.q_NAKF).copy_(q)
        self.by_head(self.x_NAKF).copy_(k)
        torch.sub(self.by_head(self.x_NAKF), v, out=self.by_head(self.residual_NAKF))
        gamma_beta_A1F = gamma_A1F * beta_A1F
        torch.addcmul(gamma_beta_A1F, gamma_A1F, self.residual_NAKF, out=self.u_NAKF)
        torch.mul(self.lam_NAK.unsqueeze(-1), -self.tau_step, out=self.rate_NAK1)
        torch.mul(self.x_NAKE, self.rate_NAK1, out=self.step_NAKE)
        torch.mul(tau_K[:K, None], self.lam_NAK.unsqueeze(-2), out=self.eta_NAKK).tril_()
        torch.bmm(flat(self.q_NAKE), flat(self.x_NAKE).mT, out=flat(self.S_NAKK))
        torch.mul(self.eta_NAKK, self.S_NAKK, out=self.P_NAKK)

    def inner_gradient(self, Z, u):
        """G = dl/dZ = Pi(u) with u = gamma (gamma Z_hat + offset); `u` comes as gamma offset."""
        norm = normalise(Z)
        return project(u.addcmul_(self.gamma2_A1F, norm.hat), norm)

    def write_output(self, Zbar_NAKF, output):
        """q + gamma LN(Zbar) + beta."""
        hat_NAKF = normalise(Zbar_NAKF).hat
        torch.addcmul(self.q_NAKF, self.gamma_A1F, hat_NAKF, out=hat_NAKF)
        torch.add(self.by_head(hat_NAKF), self.of_heads(self.beta_A1F), out=output)

    def inner_gradients(self, Z_NAKF):
        """G of all mini-batches from Z, with what `inner_gradient_backward` wants to know."""
        norm, scratch = normalise(Z_NAKF), self.scratch_NAKF
        u = self.u_NAKF.addcmul_(self.gamma2_A1F, norm.hat)
        G = self.G_NAKF.copy_(project(u, norm))
        torch.stack((norm.hat, G), 2, out=self.hG_NA2KF)
        self.rstd_NAK1.copy_(norm.rstd)
        scale = torch.mul(norm.rstd, -1 / self.shape[-1], out=self.scale_NA1K1[:, :, 0])
        torch.sum(torch.mul(u, norm.hat, out=scratch), -1, keepdim=True, out=self.h_NAK1)
        self.h_NAK1 *= scale
        self.norms = [Normalised(*rows) for rows in zip(*norm)]

    def output_backward(self, d_output, Zbar_NAKF):
        """From d_output [N, B, H, K, F] to dZbar, and to dP of the layer that gave Zbar - P G."""
        d_output_NAKF = self.scratch_NAKF
        self.by_head(d_output_NAKF).copy_(d_output)
        norm = normalise(Zbar_NAKF)
        self.dbeta_AF = d_output_NAKF.sum((0, 2))
        self.dZbar_NAKF.copy_(project(torch.mul(self.gamma_A1F, d_output_NAKF), norm))
        self.dgamma_AF = norm.hat.mul_(d_output_NAKF).sum((0, 2))
        dZbar, GT = flat(self.dZbar_NAKF), flat(self.G_NAKF).mT
        flat(self.dP_NAKK).baddbmm_(dZbar, GT, beta=0, alpha=-1)

    def inner_gradient_backward(self, m, norm):
        """From dG to dZ, with du = Pi(dG): as Pi is linear and Pi(u) = G,

        dZ = Pi(gamma^2 du - mean(u Z_hat)/s dG) - (mean(dG Z_hat) G + mean(dG G) Z_hat) / s.
        """
        torch.mul(m.dG_A1KF, m.hG1, out=self.scratch_A3KF)
        sums = torch.sum(self.scratch_A3KF, -1, keepdim=True, out=self.dots_A3K1)
        of_hat, of_G, of_1 = sums.mul_(m.scale).unbind(1)
        du = torch.mul(m.dG, m.rstd, out=m.du).add_(of_1).addcmul_(of_hat, m.hat)
        torch.mul(self.gamma2_A1F, du, out=self.scratch_AKF).addcmul_(m.h, m.dG)
        dZ = project(self.scratch_AKF, norm).addcmul_(of_hat, m.G)
        torch.addcmul(dZ, of_G, m.hat, out=m.dZ)

    def similarity_backward(self, dS_NAKK):
        """Through S = q x^T: add dS^T q to dx and dS x to dq."""
        K = self.shape[3]
        self.dSS_NA2K2K[:, :, :K, K:] = dS_NAKK.mT
        self.dSS_NA2K2K[:, :, K:, :K] = dS_NAKK
        xq = flat(self.xq_NA2KE)[..., : self.shape[4]]
        flat(self.dxq_NA2KF).baddbmm_(flat(self.dSS_NA2K2K), xq)

    def gradients(self, dPS_NAKK, Y_NAK, d_output, d_tokens):
        """All gradients, when those of q and x are done but for the outer residual's and the inner
        target's. lam and tau get theirs from P (dP * S) and from the state's step
        (Y_j = <x_j dW', G_j>)."""
        gamma, tau_K, lam_NAK, K = self.gamma_A1F, self.tau_K, self.lam_NAK, self.shape[3]
        dPS_NAKK.tril_()
        dlam_NAK = (tau_K[:K] @ dPS_NAKK).addcmul_(Y_NAK, self.tau_step, value=-1)
        dtau = torch.zeros_like(tau_K)
        dtau[:K] = (dPS_NAKK @ lam_NAK.unsqueeze(-1)).sum((0, 1, 3))
        if len(tau_K) == K:
            dtau[-1] -= (Y_NAK * lam_NAK).sum()

        # u = gamma (gamma Z_hat + residual + beta), residual = x - v.
        (dq, dk, dv, dlam), du_NAKF = d_tokens, self.du_NAKF
        torch.add(self.by_head(self.dq_NAKF), d_output, out=dq)
        torch.addcmul(self.dx_NAKF, gamma, du_NAKF, out=self.dx_NAKF)
        dk.copy_(self.by_head(self.dx_NAKF))
        torch.mul(self.by_head(du_NAKF), self.of_heads(-gamma), out=dv)
        dlam.copy_(self.by_head(dlam_NAK))
        du_AF = du_NAKF.sum((0, 2))
        weighted = self.residual_NAKF.addcmul_(gamma, self.hG_NA2KF[:, :, 0], value=2)
        dgamma_AF = weighted.mul_(du_NAKF).sum((0, 2)).addcmul_(self.beta_A1F.squeeze(1), du_AF)
        dgamma_AF += self.dgamma_AF
        dbeta_AF = torch.addcmul(self.dbeta_AF, gamma.squeeze(1), du_AF)
        return dtau, *(self.of_heads(x).sum(0) for x in (dgamma_AF, dbeta_AF))
