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

from megatron_ttt.mixers.ttt.layernorm import normalise, normalise_again, project

GROWTH = 32
"""How much larger weights may be after a group whose steps are taken back. The same in
cpp/backward.h and triton/common.py."""


def augmented(width: int) -> int:
    """Room for `width` features, the 1, and zeros up to a multiple of 8."""
    return 8 * (width // 8 + 1)


def append_bias(W: Tensor, b: Tensor) -> Tensor:
    """Weights [B, H, I, J] over the bias [B, H, 1, J] over zeros, as [A, I + 1.., J]."""
    zeros = augmented(W.shape[-2]) - W.shape[-2] - 1
    return torch.nn.functional.pad(torch.cat((W, b), -2), (0, 0, 0, zeros)).flatten(0, 1)


def grew(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    """Whether a group made weights [A, I, J] of a head more than `GROWTH` times as large.

    Taking a step back leaves the rounding error of the larger state in the smaller one. What is
    before and after the group says enough: behind a LayerNorm a gradient is orthogonal to the
    weights and bias that it is taken by, so that a step makes these together larger, never smaller.
    """
    return any(
        (x.flatten(1).norm(dim=1) > GROWTH * W.flatten(1).norm(dim=1)).any().item()
        for W, x in zip(before, after)
    )


def merge_batch(x_NA: Tensor) -> Tensor:
    """Mini-batches and heads as one batch dimension."""
    return x_NA.flatten(0, 1)


def per_mini_batch(**tensors) -> list[SimpleNamespace]:
    """One namespace of views per mini-batch."""
    return [SimpleNamespace(**dict(zip(tensors, views))) for views in zip(*tensors.values())]


class MiniBatchWorkspace:
    """What does not depend on the inner model. `shape` is [N, B, H, K, F]; `like` gives dtype and
    device. The subclasses add

    - pack, unpack: between the state as its users know it and as the loops do,
    - state: tensors stepped by `forward`, and `start`, which sets them,
    - forward(output): fills it; leaves in `kept` the state after the group and what else the
      backward wants,
    - restore(before, *kept): gives a group its state before it and what was kept of it,
    - backward(d_output, d_tokens): fills the gradients of q, k, v and lam, returns those of tau,
      gamma and beta; takes the state's gradient, given on construction, from after the group to
      before it.

    Tokens from outside are views [N, B, H, K, ...] of any float dtype.
    """

    def __init__(self, shape: torch.Size, like: Tensor, for_backward: bool):
        self.shape = shape
        self.statistics = []
        N, B, H, K, F = shape
        A, E = B * H, augmented(F)
        new = self.new = like.new_empty
        self.xq_NA2KE = like.new_zeros(N, A, 2 * K, E)
        self.xq_NA2KE[..., F] = 1
        self.x_NAKE, self.q_NAKE = self.xq_NA2KE.split(K, 2)
        self.x_NAKF, self.q_NAKF = self.x_NAKE[..., :F], self.q_NAKE[..., :F]
        self.rate_NAK1, self.step_NAKE = new(N, A, K, 1), new(N, A, K, E)
        self.u_NAKF = new(N, A, K, F)
        self.eta_NAKK, self.S_NAKK, self.P_NAKK = new(3, N, A, K, K)
        if not for_backward:
            self.residual_NAKF = self.u_NAKF  # only u is made of it
            self.G_NAKF = new(N, A, K, F)
            return
        self.residual_NAKF = new(N, A, K, F)
        self.dZs_NA3KF = new(N, A, 3 * K, F)
        self.dZ_NAKF, self.dZbar_NAKF, self.G_NAKF = self.dZs_NA3KF.split(K, 2)
        self.dxq_NA2KF = new(N, A, 2 * K, F)
        self.dx_NAKF, self.dq_NAKF = self.dxq_NA2KF.split(K, 2)
        self.dG_NAKF, self.gamma2_hat_NAKF, self.scratch_NAKF = new(3, N, A, K, F)
        self.dP_NAKK = new(N, A, K, K)
        self.dSS_NA2K2K = like.new_zeros(N, A, 2 * K, 2 * K)
        # The Hessian, see `inner_gradients`. The rows of V are hat, w, hat, 1, t, 1: in each pair
        # that the Hessian has, one follows the other. `own_AK5K` leaves a token its own rows.
        self.D_NAKF = new(N, A, K, F)
        self.V_NA6KF = new(N, A, 6 * K, F)
        hat, self.w_NAKF, hat_again, one, self.t_NAKF, one_again = self.V_NA6KF.split(K, 2)
        self.hats = hat, hat_again
        for ones in (one, one_again):
            ones.fill_(1)
        paired = like.new_tensor([1, 1, 0, 1, 1]) / F
        own_K5K = torch.kron(paired, torch.eye(K, dtype=like.dtype, device=like.device))
        self.own_AK5K = own_K5K.repeat(A, 1, 1)
        self.minus_rstd_NAK1 = new(N, A, K, 1)
        self.scratch_AKF, self.pairs_AKF = new(2, A, K, F)
        self.dots_AK5K = new(A, K, 5 * K)
        self.hessians = per_mini_batch(
            minus_rstd=self.minus_rstd_NAK1,
            D=self.D_NAKF,
            VT=self.V_NA6KF[:, :, : 5 * K].mT,
            V_next=self.V_NA6KF[:, :, K:],
            dG=self.dG_NAKF,
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
        torch.bmm(
            merge_batch(self.q_NAKE), merge_batch(self.x_NAKE).mT, out=merge_batch(self.S_NAKK)
        )
        torch.mul(self.eta_NAKK, self.S_NAKK, out=self.P_NAKK)

    def inner_gradient(self, Z, u):
        """G = dl/dZ = Pi(u) with u = gamma (gamma Z_hat + offset); `u` comes as gamma offset."""
        norm = normalise(Z)
        self.statistics.append((norm.mean, norm.rstd))
        return project(u.addcmul_(self.gamma2_A1F, norm.hat), norm)

    def write_output(self, Zbar_NAKF, output):
        """q + gamma LN(Zbar) + beta. Returns for `kept` mean and 1/s, of Z and of Zbar."""
        norm = normalise(Zbar_NAKF)
        torch.addcmul(self.q_NAKF, self.gamma_A1F, norm.hat, out=norm.hat)
        torch.add(self.by_head(norm.hat), self.of_heads(self.beta_A1F), out=output)
        statistics_4NAK1 = self.keep(4, *norm.mean.shape)
        for of_group, of_mini_batches in zip(statistics_4NAK1, zip(*self.statistics)):
            torch.stack(of_mini_batches, out=of_group)
        torch.stack((norm.mean, norm.rstd), out=statistics_4NAK1[2:])
        self.statistics.clear()
        return statistics_4NAK1

    def restore_norms(self, Z_NAKF, Zbar_NAKF, statistics_4NAK1):
        """LN(Z) and LN(Zbar) from what `kept` has of them."""
        mean, rstd, mean_bar, rstd_bar = statistics_4NAK1
        self.norm = normalise_again(Z_NAKF, mean, rstd)
        self.norm_bar = normalise_again(Zbar_NAKF, mean_bar, rstd_bar)

    def inner_gradients(self):
        """G of all mini-batches, and the loss's Hessian, which takes dG to dZ: a diagonal D and
        four pairs of vectors a token. With mean products <.,.>, and 1/s = rstd,

        -s dZ = D dG + hat <w, dG> + w <hat, dG> + 1 <t, dG> + t <1, dG>,
        D = (h - gamma^2) / s,  h = <u, hat>,
        w = G + (gamma^2 hat - <gamma^2, hat> - (h + <gamma^2 hat, hat>) hat / 2) / s,
        t = (h - <gamma, gamma>) / 2s - D.
        """
        hat, rstd, gamma2 = self.norm.hat, self.norm.rstd, self.gamma2_A1F
        gamma2_hat = torch.mul(gamma2, hat, out=self.gamma2_hat_NAKF)
        scratch = self.scratch_NAKF
        u = self.u_NAKF.add_(gamma2_hat)
        G = self.G_NAKF.copy_(project(u, self.norm))
        h = torch.mul(u, hat, out=scratch).mean(-1, keepdim=True)
        both = torch.mul(gamma2_hat, hat, out=scratch).mean(-1, keepdim=True).add_(h).mul_(rstd)
        w = torch.addcmul(G, rstd, gamma2_hat, out=self.w_NAKF).addcmul_(both, hat, value=-0.5)
        w.sub_(gamma2_hat.mean(-1, keepdim=True).mul_(rstd))
        D = torch.sub(h, gamma2, out=self.D_NAKF).mul_(rstd)
        half = h.sub_(gamma2.mean(-1, keepdim=True)).mul_(rstd).mul_(0.5)
        torch.sub(half, D, out=self.t_NAKF)
        torch.neg(rstd, out=self.minus_rstd_NAK1)
        for hats in self.hats:
            hats.copy_(hat)

    def output_backward(self, d_output):
        """From d_output [N, B, H, K, F] to dZbar, and to dP of the layer that gave Zbar - P G."""
        norm, d_hat_NAKF = self.norm_bar, self.scratch_NAKF
        torch.mul(self.of_heads(self.gamma_A1F), d_output, out=self.by_head(d_hat_NAKF))
        self.dZbar_NAKF.copy_(project(d_hat_NAKF, norm))
        self.by_head(norm.hat).mul_(d_output)
        self.dgamma_NAKF = norm.hat
        dZbar, GT = merge_batch(self.dZbar_NAKF), merge_batch(self.G_NAKF).mT
        merge_batch(self.dP_NAKK).baddbmm_(dZbar, GT, beta=0, alpha=-1)

    def inner_gradient_backward(self, m):
        """From dG to dZ, by the Hessian."""
        dG = torch.mul(m.dG, m.minus_rstd, out=self.scratch_AKF)
        dots = torch.bmm(dG, m.VT, out=self.dots_AK5K).mul_(self.own_AK5K)
        torch.addcmul(torch.bmm(dots, m.V_next, out=self.pairs_AKF), m.D, dG, out=m.dZ)

    def similarity_backward(self, dS_NAKK):
        """Through S = q x^T: add dS^T q to dx and dS x to dq."""
        K = self.shape[3]
        self.dSS_NA2K2K[:, :, :K, K:] = dS_NAKK.mT
        self.dSS_NA2K2K[:, :, K:, :K] = dS_NAKK
        xq = merge_batch(self.xq_NA2KE)[..., : self.shape[4]]
        merge_batch(self.dxq_NA2KF).baddbmm_(merge_batch(self.dSS_NA2K2K), xq)

    def gradients(self, dPS_NAKK, Y_NAK, d_output, d_tokens):
        """All gradients, when those of q and x are done but for the outer residual's and the inner
        target's. lam and tau get theirs from P (dP * S) and from the state's step
        (Y_j = <x_j dW', G_j>)."""
        gamma, tau_K, lam_NAK, K = self.gamma_A1F, self.tau_K, self.lam_NAK, self.shape[3]
        dPS_NAKK.tril_()
        dlam_NAK = (tau_K[:K, None] * dPS_NAKK).sum(-2).addcmul_(Y_NAK, self.tau_step, value=-1)
        dtau = torch.zeros_like(tau_K)
        dtau[:K] = (dPS_NAKK @ lam_NAK.unsqueeze(-1)).sum((0, 1, 3))
        if len(tau_K) == K:
            dtau[-1] -= (Y_NAK * lam_NAK).sum()

        # u = gamma (gamma Z_hat + residual + beta), residual = x - v. Sums over tokens go over the
        # mini-batches first: one sum over all takes eight times as long.
        (dq, dk, dv, dlam), du_NAKF = d_tokens, project(self.dG_NAKF, self.norm)
        torch.add(self.by_head(self.dq_NAKF), d_output, out=dq)
        weighted = self.residual_NAKF.addcmul_(gamma, self.norm.hat, value=2)
        dgamma_AKF = self.dgamma_NAKF.addcmul_(weighted, du_NAKF).sum(0)
        dbeta_AKF, du_AKF = d_output.sum(0, dtype=gamma.dtype).flatten(0, 1), du_NAKF.sum(0)
        dgamma_AKF.addcmul_(self.beta_A1F, du_AKF)
        dbeta_AKF.addcmul_(gamma, du_AKF)
        d_target = self.by_head(du_NAKF.mul_(-gamma))
        torch.sub(self.by_head(self.dx_NAKF), d_target, out=dk)
        dv.copy_(d_target)
        dlam.copy_(self.by_head(dlam_NAK))
        return dtau, *(self.of_heads(x).sum((0, 2)) for x in (dgamma_AKF, dbeta_AKF))
