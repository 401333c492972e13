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

Where a group of steps made the state so much larger that its rounding would be the loss of the one
before (GROWTH), each mini-batch's state is made again forwards from the one before the group: on
average GROUP / 2 more products a mini-batch, but no memory, and in that group alone.

Names and sizes are those of `../triton/common.py`. [P, P] and [P, 1] tiles hold W, transposed, and
b.
"""

import torch
import triton
import triton.language as tl

from megatron_ttt.mixers.ttt.triton.common import (
    GROWTH,
    TRITON_DTYPE,
    autotuned,
    crowded,
    dot,
    inner_gradient_backward,
    kept_states,
    load_tokens,
    new,
    normalise,
    of_head,
    operand,
    operand_dtype,
    project,
    strides,
)
from megatron_ttt.ops.triton.common import FMA, padded

CHOICES = [{"num_warps": 4}, {"num_warps": 8}]


@autotuned(CHOICES, key=["F", "K", "crowded"])
@triton.jit(do_not_specialize=["L", "C", "H", "crowded"])
def linear_forward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF, W_BHFF, b_BH1F,
    out_BHLF, G_ALF, W_ACFF, b_ACF, W_final_AFF, b_final_AF,
    L, C, H, crowded,
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

    index, features = tl.arange(0, K), tl.arange(0, P)[:, None]
    real = features < F
    W_tile = tl.arange(0, P)[None, :] * F + features
    in_W = (tl.arange(0, P)[None, :] < F) & real
    causal, tau, tau_last, gamma, beta = of_head(
        tau_K, gamma_HF, beta_HF, head, index, features, F, K
    )
    W = tl.load(W_BHFF + batch * W_b + head * W_h + W_tile, mask=in_W, other=0.0)
    b = tl.load(b_BH1F + batch * b_b + head * b_h + features, mask=real, other=0.0)

    N = tl.cdiv(L, K)
    for c in range(C):
        for n in range(c * GROUP, tl.minimum((c + 1) * GROUP, N)):
            tokens = n * K + index.to(tl.int64)
            here = tokens < L
            lam = tl.load(lam_L + tokens, mask=here, other=0.0)
            tokens, inside = tokens[None, :], here[None, :] & real
            q = load_tokens(q_LF, features, tokens, q_l, inside)
            x = load_tokens(k_LF, features, tokens, k_l, inside)
            v = load_tokens(v_LF, features, tokens, v_l, inside)

            hat, rstd = normalise(dot(W, x, DOT) + b, features, F, P)
            u = gamma * (gamma * hat + beta + x - v)
            G = operand(project(u, hat, rstd, features, F, P), DOT)

            S = dot(tl.trans(x), q, DOT) + 1
            PS = tl.where(causal, lam[:, None] * tau[None, :] * S, 0.0)
            hat, _ = normalise(dot(W, q, DOT) + b - dot(G, PS, DOT), features, F, P)
            out = q + gamma * hat + beta
            tl.store(out_LF + tokens * out_l + features, out, mask=inside)

            # After a ragged mini-batch the state stays.
            rate = (tl.where((n + 1) * K <= L, tau_last, 0.0) * lam)[None, :]
            W -= dot(G, tl.trans(rate * x), DOT)
            b -= tl.sum(rate * G, 1)[:, None]
            if KEEP:
                tl.store(G_LF + tokens * F + features, G, mask=inside)
        if KEEP:
            kept = a * C + c
            tl.store(W_ACFF + kept * F * F + W_tile, W, mask=in_W)
            tl.store(b_ACF + kept * F + features, b, mask=real)

    tl.store(W_final_AFF + a * F * F + W_tile, W, mask=in_W)
    tl.store(b_final_AF + a * F + features, b, mask=real)


@autotuned(CHOICES, key=["F", "K", "crowded"])
@triton.jit(do_not_specialize=["L", "C", "H", "crowded"])
def linear_backward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF, W_BHFF, b_BH1F, G_ALF, W_ACFF, b_ACF,
    dout_BHLF,
    dq_BHLF, dk_BHLF, dv_BHLF, dlam_AL, dtau_AK, dgamma_AF, dbeta_AF, dW_AFF, db_AF,
    dW_final_AFF, db_final_AF,
    L, C, H, crowded,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, W_b, W_h, b_b, b_h, dout_b, dout_h, dout_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    F: tl.constexpr, P: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid [A]. From dq to db are the gradients to write, dtau, dgamma and dbeta as one partial sum
    a program; the other arguments are the forward's and the gradients of its outputs."""
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

    index, features = tl.arange(0, K), tl.arange(0, P)[:, None]
    real = features < F
    W_tile = tl.arange(0, P)[None, :] * F + features
    in_W = (tl.arange(0, P)[None, :] < F) & real
    causal, tau, tau_last, gamma, beta = of_head(
        tau_K, gamma_HF, beta_HF, head, index, features, F, K
    )
    dW = tl.load(dW_final_AFF + a * F * F + W_tile, mask=in_W, other=0.0)
    db = tl.load(db_final_AF + a * F + features, mask=real, other=0.0)
    dgamma, dbeta = tl.zeros((P, 1), tl.float32), tl.zeros((P, 1), tl.float32)
    dtau = tl.zeros((K,), tl.float32)

    N = tl.cdiv(L, K)
    for c in range(C):
        kept = a * C + C - 1 - c
        W_before, b_before = W_ACFF + (kept - 1) * F * F, b_ACF + (kept - 1) * F
        if c == C - 1:
            W_before = W_BHFF + batch * W_b + head * W_h
            b_before = b_BH1F + batch * b_b + head * b_h
        W = tl.load(W_before + W_tile, mask=in_W, other=0.0)
        limit = GROWTH * GROWTH * tl.sum(W * W)
        W = tl.load(W_ACFF + kept * F * F + W_tile, mask=in_W, other=0.0)
        b = tl.load(b_ACF + kept * F + features, mask=real, other=0.0)
        forwards = tl.sum(W * W) + tl.sum(b * b) > limit
        first = (C - 1 - c) * GROUP
        last = tl.minimum(first + GROUP, N) - 1
        for n in range(last, first - 1, -1):
            if forwards:
                W = tl.load(W_before + W_tile, mask=in_W, other=0.0)
                b = tl.load(b_before + features, mask=real, other=0.0)
                for m in range(first, n):
                    tokens_m = (m * K + index.to(tl.int64))[None, :]
                    rate_m = tau_last * tl.load(lam_L + tokens_m)
                    x_m = load_tokens(k_LF, features, tokens_m, k_l, real)
                    G_m = load_tokens(G_LF, features, tokens_m, F, real)
                    W -= dot(G_m, tl.trans(rate_m * x_m), DOT)
                    b -= tl.sum(rate_m * G_m, 1)[:, None]
            tokens = n * K + index.to(tl.int64)
            here = tokens < L
            lam = tl.load(lam_L + tokens, mask=here, other=0.0)
            dlam_K = dlam_L + tokens
            tokens, inside = tokens[None, :], here[None, :] & real
            q = load_tokens(q_LF, features, tokens, q_l, inside)
            x = load_tokens(k_LF, features, tokens, k_l, inside)
            v = load_tokens(v_LF, features, tokens, v_l, inside)
            G = load_tokens(G_LF, features, tokens, F, inside)
            dout = load_tokens(dout_LF, features, tokens, dout_l, inside)
            tau_step = tl.where((n + 1) * K <= L, tau_last, 0.0)
            rate = (tau_step * lam)[None, :]

            # The state before the mini-batch, if it is not there already, and the output's norm.
            rate_back = tl.where(forwards, 0.0, rate)
            W += dot(G, tl.trans(rate_back * x), DOT)
            b += tl.sum(rate_back * G, 1)[:, None]
            eta = tl.where(causal, lam[:, None] * tau[None, :], 0.0)
            S = dot(tl.trans(x), q, DOT) + 1
            PS = eta * S
            hat, rstd = normalise(dot(W, q, DOT) + b - dot(G, PS, DOT), features, F, P)
            dgamma += tl.sum(dout * hat, 1)[:, None]
            dbeta += tl.sum(dout, 1)[:, None]
            dZbar = project(gamma * dout, hat, rstd, features, F, P)

            # The output's product.
            dP = tl.where(causal, -dot(tl.trans(G), dZbar, DOT), 0.0)
            dS = dP * eta
            dPS = dP * S
            dq = dout + dot(tl.trans(W), dZbar, DOT) + dot(x, dS, DOT)
            tl.store(dq_LF + tokens * dq_l + features, dq, mask=inside)

            # The state's update.
            Y = dot(dW, x, DOT) + db
            YG = tl.sum(Y * G, 0)
            dG = -dot(dZbar, tl.trans(PS), DOT) - rate * Y
            dx = dot(q, tl.trans(dS), DOT) - rate * dot(tl.trans(dW), G, DOT)
            dlam = tl.sum(dPS * tau[None, :], 1) - tau_step * YG
            tl.store(dlam_K, dlam, mask=here)
            dtau += tl.sum(dPS * lam[:, None], 0)
            if (n + 1) * K <= L:
                dtau -= tl.where(index == K - 1, tl.sum(lam * YG, 0), 0.0)

            # Second order, and the inner layer.
            hat, rstd = normalise(dot(W, x, DOT) + b, features, F, P)
            dZ, du, dgamma_rows = inner_gradient_backward(
                dG, G, hat, rstd, x - v, gamma, beta, features, F, P
            )
            dgamma += tl.sum(dgamma_rows, 1)[:, None]
            dbeta += tl.sum(gamma * du, 1)[:, None]
            dx += gamma * du + dot(tl.trans(W), dZ, DOT)
            tl.store(dv_LF + tokens * dv_l + features, -gamma * du, mask=inside)
            tl.store(dk_LF + tokens * dk_l + features, dx, mask=inside)
            dW += dot(dZbar, tl.trans(q), DOT) + dot(dZ, tl.trans(x), DOT)
            db += tl.sum(dZbar + dZ, 1)[:, None]

    tl.store(dW_AFF + a * F * F + W_tile, dW, mask=in_W)
    tl.store(db_AF + a * F + features, db, mask=real)
    tl.store(dtau_AK + a * K + index, dtau)
    tl.store(dgamma_AF + a * F + features, dgamma, mask=real)
    tl.store(dbeta_AF + a * F + features, dbeta, mask=real)


def forward(q, k, v, lam_AL, tau, gamma, beta, state, group, keep):
    """The outputs, the final state, and what `backward` wants back (nothing unless `keep`)."""
    W, b = state
    (B, H, L, F), K = q.shape, len(tau)
    A, C = B * H, kept_states(L, K, group)
    out, final = torch.empty_like(q), [new(W, B, H, F, F), new(b, B, H, 1, F)]
    DOT = operand_dtype(q, k, v)
    A_kept = A if keep else 0
    kept = [
        q.new_empty((A_kept, L, F), dtype=DOT),
        new(W, A_kept, C, F, F),
        new(b, A_kept, C, F),
    ]
    linear_forward[A,](
        q, k, v, lam_AL, tau, gamma, beta, W, b, out, *kept, *final, L, C, H, crowded(A),
        *strides(q, k, v), *W.stride()[:2], *b.stride()[:2], *strides(out),
        F=F, P=padded(F), K=K, GROUP=group, KEEP=keep, DOT=TRITON_DTYPE[DOT], **FMA,
    )  # fmt: skip
    return out, final, kept


def backward(q, k, v, lam_AL, tau, gamma, beta, state, kept, group, dout, dfinal):
    """The gradients of q, k, v, lam, tau, gamma, beta, and of the state [B, H, ...]; those of tau,
    gamma and beta by head of each sequence."""
    W, b = state
    (B, H, L, F), K = q.shape, len(tau)
    A, C = B * H, kept_states(L, K, group)
    tokens = [torch.empty_like(x) for x in (q, k, v)]
    shared = [new(W, A, K), new(W, A, F), new(W, A, F)]
    d_state = [new(d, *d.shape) for d in dfinal]
    dlam = torch.empty_like(lam_AL)
    linear_backward[A,](
        q, k, v, lam_AL, tau, gamma, beta, W, b, *kept, dout,
        *tokens, dlam, *shared, *d_state, *dfinal, L, C, H, crowded(A),
        *strides(q, k, v), *W.stride()[:2], *b.stride()[:2], *strides(dout, *tokens),
        F=F, P=padded(F), K=K, GROUP=group, DOT=TRITON_DTYPE[kept[0].dtype], **FMA,
    )  # fmt: skip
    return *tokens, dlam, *shared, d_state
