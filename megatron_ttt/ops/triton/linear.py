"""TTT-Linear in Triton, forward and backward (docs/mathematics.md).

One program takes one head of one sequence through all its mini-batches, its state in registers
(W is 16 KiB at F = 64; in the backward there are two, W and dW). Nothing crosses programs: what is
summed over heads or batch leaves as one partial sum a program, so results repeat bit for bit.

The forward keeps G, rounded to the operands' dtype as its products see it, and the state after
every GROUP mini-batches. The backward does not run the forward again: knowing G, it takes each
step back, W = W' + (tau_K lam x)^T G with the forward's very operands. What a step back loses is
float32's rounding, and it starts afresh from a kept state every GROUP steps. G is 2 KiB a
mini-batch (K = 16, F = 64, bf16); keeping every state instead would be 16.25 KiB, running groups
again a third pass through the chain of dependent steps, which is what bounds the time.

Sizes: A = B * H heads of sequences, L sequence, F head dim, P >= F a power of two, K mini-batch,
C = ceil(ceil(L / K) / GROUP) kept states. [P, P] and [1, P] tiles hold W and b.
"""

import torch
import triton
import triton.language as tl

from megatron_ttt.ops.triton.common import (
    TRITON_DTYPE,
    autotuned,
    dot,
    inner_gradient_backward,
    kept_states,
    load_tokens,
    new,
    normalise,
    operand,
    operand_dtype,
    padded,
    project,
    strides,
)


@autotuned(warps=(2, 4, 8), key=["F", "K", "KEEP"])
@triton.jit(do_not_specialize=["L", "C"])
def linear_forward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF, W_BHFF, b_BH1F,
    out_BHLF, G_ALF, W_ACFF, b_ACF, W_final_AFF, b_final_AF,
    L, C, H,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, W_b, W_h, b_b, b_h, out_b, out_h, out_l,
    F: tl.constexpr, P: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, KEEP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Grid [A]. KEEP: write what the backward wants, G, W_ACFF and b_ACF."""
    a = tl.program_id(0).to(tl.int64)
    batch, head = a // H, a % H
    q_LF = q_BHLF + batch * q_b + head * q_h
    k_LF = k_BHLF + batch * k_b + head * k_h
    v_LF = v_BHLF + batch * v_b + head * v_h
    out_LF = out_BHLF + batch * out_b + head * out_h
    lam_L = lam_AL + a * L
    G_LF = G_ALF + a * L * F

    rows, columns = tl.arange(0, K), tl.arange(0, P)[None, :]
    features = tl.arange(0, P)[:, None]
    real = columns < F
    in_W = (features < F) & real
    W_tile = features * F + columns
    causal = rows[:, None] >= rows[None, :]
    tau = tl.load(tau_K + rows)
    tau_last = tl.load(tau_K + K - 1)
    gamma = tl.load(gamma_HF + head * F + columns, mask=real, other=0.0)
    beta = tl.load(beta_HF + head * F + columns, mask=real, other=0.0)
    W = tl.load(W_BHFF + batch * W_b + head * W_h + W_tile, mask=in_W, other=0.0)
    b = tl.load(b_BH1F + batch * b_b + head * b_h + columns, mask=real, other=0.0)

    for n in range(tl.cdiv(L, K)):
        tokens = n * K + rows.to(tl.int64)
        here = tokens < L
        tokens, inside = tokens[:, None], here[:, None] & real
        q = load_tokens(q_LF, tokens, q_l, columns, inside)
        x = load_tokens(k_LF, tokens, k_l, columns, inside)
        v = load_tokens(v_LF, tokens, v_l, columns, inside)
        lam = tl.load(lam_L + n * K + rows, mask=here, other=0.0)

        hat, rstd = normalise(dot(x, W, DOT) + b, columns, F, P)
        u = gamma * (gamma * hat + beta + x - v)
        G = operand(project(u, hat, rstd, columns, F, P), DOT)

        S = dot(q, tl.trans(x), DOT) + 1
        PS = tl.where(causal, tau[:, None] * lam[None, :] * S, 0.0)
        hat, _ = normalise(dot(q, W, DOT) + b - dot(PS, G, DOT), columns, F, P)
        out = q + gamma * hat + beta
        tl.store(out_LF + tokens * out_l + columns, out, mask=inside)

        # After a ragged mini-batch the state stays.
        rate = (tl.where((n + 1) * K <= L, tau_last, 0.0) * lam)[:, None]
        W -= dot(tl.trans(rate * x), G, DOT)
        b -= tl.sum(rate * G, 0)[None, :]
        if KEEP:
            tl.store(G_LF + tokens * F + columns, G, mask=inside)
            if (n + 1) % GROUP == 0 or (n + 1) * K >= L:
                kept = a * C + n // GROUP
                tl.store(W_ACFF + kept * F * F + W_tile, W, mask=in_W)
                tl.store(b_ACF + kept * F + columns, b, mask=real)

    tl.store(W_final_AFF + a * F * F + W_tile, W, mask=in_W)
    tl.store(b_final_AF + a * F + columns, b, mask=real)


@autotuned(warps=(4, 8), key=["F", "K"])
@triton.jit(do_not_specialize=["L", "C"])
def linear_backward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF, G_ALF, W_ACFF, b_ACF, dout_BHLF,
    dq_BHLF, dk_BHLF, dv_BHLF, dlam_AL, dtau_AK, dgamma_AF, dbeta_AF, dW_AFF, db_AF,
    dW_final_AFF, db_final_AF,
    L, C, H,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    F: tl.constexpr, P: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid [A]. All but q, k, v, lam, tau, gamma, beta, the forward's G, W_ACFF, b_ACF, and the
    gradients of its outputs (dout, dW_final, db_final) is written: dtau, dgamma, dbeta as one
    partial sum a program."""
    a = tl.program_id(0).to(tl.int64)
    batch, head = a // H, a % H
    q_LF = q_BHLF + batch * q_b + head * q_h
    k_LF = k_BHLF + batch * k_b + head * k_h
    v_LF = v_BHLF + batch * v_b + head * v_h
    dout_LF = dout_BHLF + batch * dout_b + head * dout_h
    dq_LF = dq_BHLF + batch * dq_b + head * dq_h
    dk_LF = dk_BHLF + batch * dk_b + head * dk_h
    dv_LF = dv_BHLF + batch * dv_b + head * dv_h
    lam_L, dlam_L = lam_AL + a * L, dlam_AL + a * L
    G_LF = G_ALF + a * L * F

    rows, columns = tl.arange(0, K), tl.arange(0, P)[None, :]
    features = tl.arange(0, P)[:, None]
    real = columns < F
    in_W = (features < F) & real
    W_tile = features * F + columns
    causal = rows[:, None] >= rows[None, :]
    tau = tl.load(tau_K + rows)
    tau_last = tl.load(tau_K + K - 1)
    gamma = tl.load(gamma_HF + head * F + columns, mask=real, other=0.0)
    beta = tl.load(beta_HF + head * F + columns, mask=real, other=0.0)
    dW = tl.load(dW_final_AFF + a * F * F + W_tile, mask=in_W, other=0.0)
    db = tl.load(db_final_AF + a * F + columns, mask=real, other=0.0)
    dgamma, dbeta = tl.zeros((1, P), tl.float32), tl.zeros((1, P), tl.float32)
    dtau = tl.zeros((K,), tl.float32)

    N = tl.cdiv(L, K)
    for c in range(C):
        kept = a * C + C - 1 - c
        W = tl.load(W_ACFF + kept * F * F + W_tile, mask=in_W, other=0.0)
        b = tl.load(b_ACF + kept * F + columns, mask=real, other=0.0)
        first = (C - 1 - c) * GROUP
        last = tl.minimum(first + GROUP, N) - 1
        for i in range(last - first + 1):
            n = last - i
            tokens = n * K + rows.to(tl.int64)
            here = tokens < L
            tokens, inside = tokens[:, None], here[:, None] & real
            q = load_tokens(q_LF, tokens, q_l, columns, inside)
            x = load_tokens(k_LF, tokens, k_l, columns, inside)
            v = load_tokens(v_LF, tokens, v_l, columns, inside)
            G = load_tokens(G_LF, tokens, F, columns, inside)
            dout = load_tokens(dout_LF, tokens, dout_l, columns, inside)
            lam = tl.load(lam_L + n * K + rows, mask=here, other=0.0)
            tau_step = tl.where((n + 1) * K <= L, tau_last, 0.0)
            rate = (tau_step * lam)[:, None]

            # The state before the mini-batch, and the output's norm.
            W += dot(tl.trans(rate * x), G, DOT)
            b += tl.sum(rate * G, 0)[None, :]
            eta = tl.where(causal, tau[:, None] * lam[None, :], 0.0)
            S = dot(q, tl.trans(x), DOT) + 1
            PS = eta * S
            hat, rstd = normalise(dot(q, W, DOT) + b - dot(PS, G, DOT), columns, F, P)
            dgamma += tl.sum(dout * hat, 0)[None, :]
            dbeta += tl.sum(dout, 0)[None, :]
            dZbar = project(gamma * dout, hat, rstd, columns, F, P)

            # The output's product.
            dP = tl.where(causal, -dot(dZbar, tl.trans(G), DOT), 0.0)
            dS = dP * eta
            dPS = dP * S
            dq = dout + dot(dZbar, tl.trans(W), DOT) + dot(dS, x, DOT)
            dx = dot(tl.trans(dS), q, DOT)
            tl.store(dq_LF + tokens * dq_l + columns, dq, mask=inside)

            # The state's update.
            Y = dot(x, dW, DOT) + db
            YG = tl.sum(Y * G, 1)
            dG = -dot(tl.trans(PS), dZbar, DOT) - rate * Y
            dx -= rate * dot(G, tl.trans(dW), DOT)
            dlam = tl.sum(dPS * tau[:, None], 0) - tau_step * YG
            tl.store(dlam_L + n * K + rows, dlam, mask=here)
            dtau += tl.sum(dPS * lam[None, :], 1)
            if (n + 1) * K <= L:
                dtau -= tl.where(rows == K - 1, tl.sum(lam * YG, 0), 0.0)

            # Second order, and the inner layer.
            hat, rstd = normalise(dot(x, W, DOT) + b, columns, F, P)
            dZ, du, dgamma_rows = inner_gradient_backward(
                dG, G, hat, rstd, x - v, gamma, beta, columns, F, P
            )
            dgamma += tl.sum(dgamma_rows, 0)[None, :]
            dbeta += tl.sum(gamma * du, 0)[None, :]
            dx += gamma * du + dot(dZ, tl.trans(W), DOT)
            tl.store(dv_LF + tokens * dv_l + columns, -gamma * du, mask=inside)
            tl.store(dk_LF + tokens * dk_l + columns, dx, mask=inside)
            dW += dot(tl.trans(q), dZbar, DOT) + dot(tl.trans(x), dZ, DOT)
            db += tl.sum(dZbar + dZ, 0)[None, :]

    tl.store(dW_AFF + a * F * F + W_tile, dW, mask=in_W)
    tl.store(db_AF + a * F + columns, db, mask=real)
    tl.store(dtau_AK + a * K + rows, dtau)
    tl.store(dgamma_AF + a * F + columns, dgamma, mask=real)
    tl.store(dbeta_AF + a * F + columns, dbeta, mask=real)


def forward(q, k, v, lam_AL, tau, gamma, beta, state, group, keep):
    """The outputs, the final state, and what `backward` wants back (nothing unless `keep`)."""
    W, b = state
    (B, H, L, F), K = q.shape, len(tau)
    A, C = B * H, kept_states(L, K, group) if keep else 0
    out, final = torch.empty_like(q), [new(W, B, H, F, F), new(b, B, H, 1, F)]
    DOT = operand_dtype(q, k, v)
    kept = [
        q.new_empty((A, L, F) if keep else 0, dtype=DOT),
        new(W, A, C, F, F),
        new(b, A, C, F),
    ]
    linear_forward[A,](
        q, k, v, lam_AL, tau, gamma, beta, W, b, out, *kept, *final, L, C, H,
        *strides(q, k, v), *W.stride()[:2], *b.stride()[:2], *strides(out),
        F=F, P=padded(F), K=K, GROUP=group, KEEP=keep, DOT=TRITON_DTYPE[DOT],
    )  # fmt: skip
    return out, final, kept


def backward(q, k, v, lam_AL, tau, gamma, beta, kept, group, dout, dfinal):
    """The gradients of q, k, v, lam, tau, gamma, beta, and of the state [B, H, ...]; those of tau,
    gamma and beta by head of each sequence."""
    G, W, b = kept
    (B, H, L, F), K = q.shape, len(tau)
    A, C = W.shape[:2]
    tokens = [torch.empty_like(x) for x in (q, k, v)]
    shared = [new(W, A, K), new(W, A, F), new(W, A, F)]
    state = [new(d, *d.shape) for d in dfinal]
    dlam = torch.empty_like(lam_AL)
    linear_backward[A,](
        q, k, v, lam_AL, tau, gamma, beta, G, W, b, dout,
        *tokens, dlam, *shared, *state, *dfinal, L, C, H,
        *strides(q, k, v, dout, *tokens),
        F=F, P=padded(F), K=K, GROUP=group, DOT=TRITON_DTYPE[G.dtype],
    )  # fmt: skip
    return *tokens, dlam, *shared, state
