import torch

from megatron_ttt.ops.layernorm import normalise, project

GROUP = 8


def pack(W, b):
    return (torch.cat((W, b), -2).flatten(0, 1),)


def unpack(W_AEF, B, H):
    W = W_AEF.unflatten(0, (B, H))
    return W[..., :-1, :].contiguous(), W[..., -1:, :].contiguous()


def flat(x):
    return x.flatten(0, 1)


def run(inputs, W_AEF, buf):
    x, lam, tau, gamma = inputs.x_NAKE, inputs.lam_NAK, inputs.tau_K, inputs.gamma_A1F
    N, A, K, E = x.shape
    F = E - 1
    offset = torch.sub(x[..., :F], inputs.v_NAKF, out=buf("offset", N, A, K, F))
    offset += inputs.beta_A1F
    u = torch.mul(gamma, offset, out=buf("u", N, A, K, F))
    gg = torch.mul(gamma, gamma, out=buf("gg", A, 1, F))
    step = torch.mul(x, (lam * -tau[-1]).unsqueeze(-1), out=buf("step", N, A, K, E))
    W = buf("W", N + 1, A, E, F)
    Z = buf("Z", N, A, K, F)
    hG = buf("hG", N, A, 2, K, F)
    W[0] = W_AEF
    norms = []
    for x_i, step_i, u_i, Z_i, hat_i, G_i, W_i, W_next in zip(
        x, step, u, Z, hG[:, :, 0], hG[:, :, 1], W, W[1:]
    ):
        torch.bmm(x_i, W_i, out=Z_i)
        norm = normalise(Z_i)
        u_i.addcmul_(gg, norm.Z_hat)
        G_i.copy_(project(u_i, norm))
        hat_i.copy_(norm.Z_hat)
        torch.baddbmm(W_i, step_i.mT, G_i, out=W_next)
        norms.append(norm)
    return hG, W, norms, u, offset, step, gg


def respond(inputs, W, G, buf):
    q, x = inputs.q_NAKE, inputs.x_NAKE
    N, A, K, E = x.shape
    F = E - 1
    rates = torch.mul(inputs.tau_K[:, None], inputs.lam_NAK.unsqueeze(-2), out=buf("rates", N, A, K, K))
    rates.tril_()
    S = torch.bmm(flat(q), flat(x).mT, out=buf("S", N * A, K, K)).view(N, A, K, K)
    P = torch.mul(rates, S, out=buf("P", N, A, K, K))
    Zbar = torch.bmm(flat(q), flat(W[:N]), out=buf("Zbar", N * A, K, F))
    Zbar.baddbmm_(flat(P), flat(G), alpha=-1)
    return rates, S, P, normalise(Zbar.view(N, A, K, F))


def forward(inputs, packed, buf):
    (W_AEF,) = packed
    F = W_AEF.shape[-1]
    hG, W, *_ = run(inputs, W_AEF, buf)
    *_, bar = respond(inputs, W, hG[:, :, 1], buf)
    out = torch.add(inputs.q_NAKE[..., :F], inputs.beta_A1F, out=buf("out", *bar.Z.shape))
    out.addcmul_(bar.Z_hat, inputs.gamma_A1F)
    return out, (W[-1],)


def backward(inputs, packed, d_out, d_packed, buf):
    (W_AEF,), (dW_AEF,) = packed, d_packed
    qx, q, x, lam, tau, gamma = (
        inputs.qx_NA2KE, inputs.q_NAKE, inputs.x_NAKE, inputs.lam_NAK, inputs.tau_K, inputs.gamma_A1F
    )
    N, A, K, E = x.shape
    F = E - 1
    hG, W, norms, u, offset, step, gg = run(inputs, W_AEF, buf)
    hat, G = hG[:, :, 0], hG[:, :, 1]
    rates, S, P, bar = respond(inputs, W, G, buf)
    # step 1
    t = torch.mul(gamma, d_out, out=buf("t", N, A, K, F))
    dZZ = buf("dZZ", N, A, 2 * K, F)
    dZbar = project(t, bar)
    dZZ[:, :, :K] = dZbar
    dgamma = torch.mul(d_out, bar.Z_hat, out=t).sum((0, 2))
    dbeta = d_out.sum((0, 2))
    dq = buf("dq", N, A, K, F).copy_(d_out)
    # step 2
    dP = torch.bmm(flat(dZbar), flat(G).mT, out=buf("dP", N * A, K, K)).view(N, A, K, K)
    dP.neg_().tril_()
    dS = torch.mul(dP, rates, out=buf("dS", N, A, K, K))
    D0 = torch.bmm(flat(P).mT, flat(dZbar), out=buf("D0", N * A, K, F)).view(N, A, K, F)
    D0.neg_()
    dP *= S
    dlam = (tau @ dP)
    dtau = torch.matmul(dP, lam.unsqueeze(-1)).sum((0, 1))[:, 0]
    # second order constants
    rstd = torch.stack([n.rstd for n in norms])
    scale = rstd * (-1 / F)
    h = torch.mul(u, hat, out=t).sum(-1, keepdim=True) * scale
    scale = scale.unsqueeze(2)
    dW = buf("dW", N + 1, A, E, F)
    dW[N] = dW_AEF
    dus = []
    prod = buf("prod", A, 2, K, F)
    D = buf("D", A, K, F)
    T = buf("T", A, K, F)
    rev = lambda x: reversed(x.unbind(0))
    for norm, D0_i, step_i, hG_i, h_i, scale_i, qx_i, dZZ_i, dW_i, dW_next in zip(
        reversed(norms), *map(rev, (D0, step, hG, h, scale, qx, dZZ, dW[:N], dW[1:]))
    ):
        torch.baddbmm(D0_i, step_i, dW_next, out=D)
        du = project(D, norm)
        torch.mul(D.unsqueeze(1), hG_i, out=prod)
        c, e = (prod.sum(-1, keepdim=True) * scale_i).unbind(1)
        torch.mul(gg, du, out=T)
        T.addcmul_(D, h_i)
        dZ = project(T, norm)
        dZ.addcmul_(e, hG_i[:, 0])
        torch.addcmul(dZ, c, hG_i[:, 1], out=dZZ_i[:, K:])
        torch.baddbmm(dW_next, qx_i.mT, dZZ_i, out=dW_i)
        dus.append(du)
    dus.reverse()
    du = torch.stack(dus, out=buf("du", N, A, K, F))
    Wt = flat(W[:N, :, :F]).mT
    flat(dq).baddbmm_(flat(dZbar), Wt).baddbmm_(flat(dS), flat(x)[..., :F])
    dx = torch.bmm(flat(dS).mT, flat(q)[..., :F], out=buf("dx", N * A, K, F))
    dx = dx.baddbmm_(flat(dZZ[:, :, K:]), Wt).view(N, A, K, F)
    R = torch.bmm(flat(G), flat(dW[1:]).mT, out=buf("R", N * A, K, E)).view(N, A, K, E)
    rate = (lam * -tau[-1]).unsqueeze(-1)
    dx.addcmul_(R[..., :F], rate)
    R *= x
    YG = R.sum(-1)
    dlam.sub_(YG * tau[-1])
    dtau[-1] -= (YG * lam).sum()
    offset.addcmul_(hat, gamma, value=2)
    dgamma += offset.mul_(du).sum((0, 2))
    du *= gamma
    dx += du
    dv = du.neg_()
    dbeta -= dv.sum((0, 2))
    return (dq, dx, dv, dlam, dtau, dgamma, dbeta), (dW[0].clone(),)
