"""TTT-MLP in Triton, the backward.

`kernels.py` has the design and the sizes, `../triton/common.py` the names.
"""

import torch
import triton
import triton.language as tl

from megatron_ttt.mixers.ttt.mlp.kernels import (
    copy_state,
    load_block,
    load_in,
    load_out,
    squares,
    store_block,
    store_in,
    store_out,
)
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
    project,
    strides,
)
from megatron_ttt.ops.triton.common import FMA, padded
from megatron_ttt.ops.triton.gelu import gelu_derivative, gelu_gate, gelu_second_derivative

CHOICES = [{"num_warps": 4}, {"num_warps": 8}]
TILES = 64 * 64 * 64
"""K * P * BM, at most: of what passes through shared memory an H100's 227 KiB hold no more."""


@triton.jit(noinline=True)
def steps_again(
    W1_FM, b1_M, W2_MF, W1_before, b1_before, W2_before,
    k_LF, k_l, lam_L, tau_last, X2_LM, G1_LM, G2_LF, first, n,
    F: tl.constexpr, P: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The state before mini-batch n, from the one before mini-batch `first`. Not inlined: for this
    rare case the kernel would spill more registers in all."""
    index, features, units = tl.arange(0, K), tl.arange(0, P)[:, None], tl.arange(0, BM)[:, None]
    row_features = tl.arange(0, P)[None, :]
    for m in range(0, M, BM):
        W1, b1, W2 = load_block(W1_before, b1_before, W2_before, m, units, row_features, F, M)
        here = m + units < M
        for i in range(first, n):
            tokens = (i * K + index.to(tl.int64))[None, :]
            rate = tau_last * tl.load(lam_L + tokens)
            x = load_tokens(k_LF, features, tokens, k_l, features < F)
            G1 = load_tokens(G1_LM, m + units, tokens, M, here)
            W1 -= dot(G1, tl.trans(rate * x), DOT)
            b1 -= tl.sum(rate * G1, 1)[:, None]
            X2 = load_tokens(X2_LM, m + units, tokens, M, here)
            G2 = load_tokens(G2_LF, features, tokens, F, features < F)
            W2 -= dot(rate * X2, tl.trans(G2), DOT)
        store_block(W1_FM, b1_M, W2_MF, W1, b1, W2, m, units, row_features, F, M)


@autotuned(CHOICES, key=["F", "M", "K", "crowded"])
@triton.jit(do_not_specialize=["L", "C", "H", "crowded"])
def mlp_backward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF, W1_BHFM, b1_BH1M, W2_BHMF,
    X2_ALM, G1_ALM, G2_ALF, Z2_ALF, Zbar_ALF, S2_ALK, W1_ACFM, b1_ACM, W2_ACMF, b2_ACF, dout_BHLF,
    dq_BHLF, dk_BHLF, dv_BHLF, dlam_AL, dtau_AK, dgamma_AF, dbeta_AF,
    dW1_AFM, db1_AM, dW2_AMF, db2_AF,
    dW1_final_AFM, db1_final_AM, dW2_final_AMF, db2_final_AF,
    W1_AFM, b1_AM, W2_AMF, dX2_AMK, dZ1_AMK, slope_AMK,
    L, C, H, crowded,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, W1_b, W1_h, b1_b, b1_h, W2_b, W2_h,
    F: tl.constexpr, P: tl.constexpr, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid [A]. The second line of arguments is the forward's; from dq to db2 are the gradients to
    write, dtau, dgamma and dbeta as one partial sum a program; from W1_AFM on is work space: the
    state, and what the first pass over a mini-batch's hidden units leaves to the second."""
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
    X2_LM, G1_LM, S2_LK = X2_ALM + a * L * M, G1_ALM + a * L * M, S2_ALK + a * L * K
    G2_LF, Z2_LF, Zbar_LF = G2_ALF + a * L * F, Z2_ALF + a * L * F, Zbar_ALF + a * L * F
    W1_FM, b1_M, W2_MF = W1_AFM + a * F * M, b1_AM + a * M, W2_AMF + a * M * F
    dW1_FM, db1_M, dW2_MF = dW1_AFM + a * F * M, db1_AM + a * M, dW2_AMF + a * M * F
    dX2_MK, dZ1_MK, slope_MK = dX2_AMK + a * M * K, dZ1_AMK + a * M * K, slope_AMK + a * M * K

    index, features, units = tl.arange(0, K), tl.arange(0, P)[:, None], tl.arange(0, BM)[:, None]
    row_features = tl.arange(0, P)[None, :]
    real = features < F
    causal, tau, tau_last, gamma, beta = of_head(
        tau_K, gamma_HF, beta_HF, head, index, features, F, K
    )
    db2 = tl.load(db2_final_AF + a * F + features, mask=real, other=0.0)
    dgamma, dbeta = tl.zeros((P, 1), tl.float32), tl.zeros((P, 1), tl.float32)
    dtau = tl.zeros((K,), tl.float32)
    copy_state(
        dW1_FM, db1_M, dW2_MF,
        dW1_final_AFM + a * F * M, db1_final_AM + a * M, dW2_final_AMF + a * M * F,
        units, row_features, F, M, BM,
    )  # fmt: skip

    N = tl.cdiv(L, K)
    for c in range(C):
        kept = a * C + C - 1 - c
        W1_after, b1_after = W1_ACFM + kept * F * M, b1_ACM + kept * M
        W2_after = W2_ACMF + kept * M * F
        copy_state(W1_FM, b1_M, W2_MF, W1_after, b1_after, W2_after, units, row_features, F, M, BM)
        tl.debug_barrier()
        W1_before, b1_before, W2_before = W1_after - F * M, b1_after - M, W2_after - M * F
        if c == C - 1:
            W1_before = W1_BHFM + batch * W1_b + head * W1_h
            b1_before = b1_BH1M + batch * b1_b + head * b1_h
            W2_before = W2_BHMF + batch * W2_b + head * W2_h
        in_before, out_before = squares(W1_before, W2_before, units, row_features, F, M, BM)
        in_after, out_after = squares(W1_after, W2_after, units, row_features, F, M, BM)
        limit = GROWTH * GROWTH
        forwards = (in_after > limit * in_before) | (out_after > limit * out_before)
        first = (C - 1 - c) * GROUP
        last = tl.minimum(first + GROUP, N) - 1
        for n in range(last, first - 1, -1):
            if forwards:
                steps_again(
                    W1_FM, b1_M, W2_MF, W1_before, b1_before, W2_before,
                    k_LF, k_l, lam_L, tau_last, X2_LM, G1_LM, G2_LF, first, n, F, P, M, K, DOT, BM,
                )  # fmt: skip
                tl.debug_barrier()
            tokens = n * K + index.to(tl.int64)
            here = tokens < L
            lam = tl.load(lam_L + tokens, mask=here, other=0.0)
            dlam_K, here_K = dlam_L + tokens, here
            tokens, here = tokens[None, :], here[None, :]
            inside = here & real
            q = load_tokens(q_LF, features, tokens, q_l, inside)
            x = load_tokens(k_LF, features, tokens, k_l, inside)
            G2 = load_tokens(G2_LF, features, tokens, F, inside)
            dout = load_tokens(dout_LF, features, tokens, dout_l, inside)
            S2 = load_tokens(S2_LK, index[:, None], tokens, K, here)
            tau_step = tl.where((n + 1) * K <= L, tau_last, 0.0)
            rate = (tau_step * lam)[None, :]
            rate_back = tl.where(forwards, 0.0, rate)
            eta = tl.where(causal, lam[:, None] * tau[None, :], 0.0)
            S1 = dot(tl.trans(x), q, DOT) + 1
            PS1 = eta * S1

            # The output's norm, and its product.
            Zbar = load_tokens(Zbar_LF, features, tokens, F, inside)
            hat, rstd = normalise(Zbar, features, F, P)
            dgamma += tl.sum(dout * hat, 1)[:, None]
            dbeta += tl.sum(dout, 1)[:, None]
            dZbar = project(gamma * dout, hat, rstd, features, F, P)
            dP2 = tl.where(causal, -dot(tl.trans(G2), dZbar, DOT), 0.0)
            dS2 = dP2 * eta
            dG2 = -dot(dZbar, tl.trans(eta * S2), DOT)

            # M2 to M5, over the hidden units; the state steps back, if it is not there already.
            dP1 = tl.zeros((K, K), tl.float32)
            YG = tl.zeros((K,), tl.float32)
            dq, dx = dout, tl.zeros((P, K), tl.float32)
            Y2 = tl.zeros((P, K), tl.float32) + db2
            for m in range(0, M, BM):
                hidden = here & (m + units < M)
                X2 = load_tokens(X2_LM, m + units, tokens, M, hidden)
                G1 = load_tokens(G1_LM, m + units, tokens, M, hidden)
                # Through the gradient of the state after the mini-batch, which is let go of again.
                dW1, db1 = load_in(dW1_FM, db1_M, m, units, row_features, F, M)
                Y1 = dot(dW1, x, DOT) + db1
                YG += tl.sum(Y1 * G1, 0)
                dG1 = -rate * Y1
                dx -= rate * dot(tl.trans(dW1), G1, DOT)
                dW2 = load_out(dW2_MF, m, units, row_features, F, M)
                dX2 = -rate * dot(dW2, G2, DOT)
                Y2 += dot(tl.trans(dW2), X2, DOT)

                W1, b1 = load_in(W1_FM, b1_M, m, units, row_features, F, M)
                W1 += dot(G1, tl.trans(rate_back * x), DOT)
                b1 += tl.sum(rate_back * G1, 1)[:, None]
                store_in(W1_FM, b1_M, W1, b1, m, units, row_features, F, M)
                W2 = load_out(W2_MF, m, units, row_features, F, M)
                W2 += dot(rate_back * X2, tl.trans(G2), DOT)
                store_out(W2_MF, W2, m, units, row_features, F, M)

                Z1bar = dot(W1, q, DOT) + b1 - dot(G1, PS1, DOT)
                gate = gelu_gate(Z1bar)
                X2bar = Z1bar * gate
                dZ1bar = dot(W2, dZbar, DOT) + dot(X2, dS2, DOT)
                dZ1bar *= gelu_derivative(Z1bar, gate)
                dX2 += dot(X2bar, tl.trans(dS2), DOT)
                dP1 -= dot(tl.trans(G1), dZ1bar, DOT)
                dG1 -= dot(dZ1bar, tl.trans(PS1), DOT)
                dq += dot(tl.trans(W1), dZ1bar, DOT)

                Z1 = dot(W1, x, DOT) + b1
                gate = gelu_gate(Z1)
                slope = gelu_derivative(Z1, gate)
                dZ1 = dG1 * dot(W2, G2, DOT) * gelu_second_derivative(Z1, gate)
                dH = dG1 * slope
                dG2 += dot(tl.trans(W2), dH, DOT)

                # Read a second time: held meanwhile, it would be spilled.
                dW1, db1 = load_in(dW1_FM, db1_M, m, units, row_features, F, M)
                dW1 += dot(dZ1bar, tl.trans(q), DOT)
                db1 += tl.sum(dZ1bar, 1)[:, None]
                store_in(dW1_FM, db1_M, dW1, db1, m, units, row_features, F, M)
                dW2 = load_out(dW2_MF, m, units, row_features, F, M)
                dW2 += dot(X2bar, tl.trans(dZbar), DOT)
                dW2 += dot(dH, tl.trans(G2), DOT)
                store_out(dW2_MF, dW2, m, units, row_features, F, M)
                tile, inside_M = (m + units) * K + index[None, :], m + units < M
                tl.store(dX2_MK + tile, dX2, mask=inside_M)
                tl.store(dZ1_MK + tile, dZ1, mask=inside_M)
                tl.store(slope_MK + tile, slope, mask=inside_M)
            tl.debug_barrier()

            dP1 = tl.where(causal, dP1, 0.0)
            dS1 = dP1 * eta
            dq += dot(x, dS1, DOT)
            dx += dot(q, tl.trans(dS1), DOT)
            tl.store(dq_LF + tokens * dq_l + features, dq, mask=inside)
            YG += tl.sum(Y2 * G2, 0)
            dPS = dP1 * S1 + dP2 * S2
            dlam = tl.sum(dPS * tau[None, :], 1) - tau_step * YG
            tl.store(dlam_K, dlam, mask=here_K)
            dtau += tl.sum(dPS * lam[:, None], 0)
            if (n + 1) * K <= L:
                dtau -= tl.where(index == K - 1, tl.sum(lam * YG, 0), 0.0)

            # M6: second order.
            v = load_tokens(v_LF, features, tokens, v_l, inside)
            Z2 = load_tokens(Z2_LF, features, tokens, F, inside)
            hat, rstd = normalise(Z2, features, F, P)
            dZ2, du, dgamma_rows = inner_gradient_backward(
                dG2 - rate * Y2, G2, hat, rstd, x - v, gamma, beta, features, F, P
            )
            dgamma += tl.sum(dgamma_rows, 1)[:, None]
            dbeta += tl.sum(gamma * du, 1)[:, None]
            db2 += tl.sum(dZbar + dZ2, 1)[:, None]
            dx += gamma * du
            tl.store(dv_LF + tokens * dv_l + features, -gamma * du, mask=inside)

            # M7 and M8, over the hidden units.
            for m in range(0, M, BM):
                tile, inside_M = (m + units) * K + index[None, :], m + units < M
                hidden = here & inside_M
                W2 = load_out(W2_MF, m, units, row_features, F, M)
                dX2 = tl.load(dX2_MK + tile, mask=inside_M, other=0.0) + dot(W2, dZ2, DOT)
                slope = tl.load(slope_MK + tile, mask=inside_M, other=0.0)
                dZ1 = tl.load(dZ1_MK + tile, mask=inside_M, other=0.0) + dX2 * slope
                W1, _ = load_in(W1_FM, b1_M, m, units, row_features, F, M)
                dx += dot(tl.trans(W1), dZ1, DOT)
                dW1, db1 = load_in(dW1_FM, db1_M, m, units, row_features, F, M)
                dW1 += dot(dZ1, tl.trans(x), DOT)
                db1 += tl.sum(dZ1, 1)[:, None]
                store_in(dW1_FM, db1_M, dW1, db1, m, units, row_features, F, M)
                X2 = load_tokens(X2_LM, m + units, tokens, M, hidden)
                dW2 = load_out(dW2_MF, m, units, row_features, F, M)
                dW2 += dot(X2, tl.trans(dZ2), DOT)
                store_out(dW2_MF, dW2, m, units, row_features, F, M)
            tl.debug_barrier()
            tl.store(dk_LF + tokens * dk_l + features, dx, mask=inside)

    tl.store(db2_AF + a * F + features, db2, mask=real)
    tl.store(dtau_AK + a * K + index, dtau)
    tl.store(dgamma_AF + a * F + features, dgamma, mask=real)
    tl.store(dbeta_AF + a * F + features, dbeta, mask=real)


def backward(q, k, v, lam_AL, tau, gamma, beta, state, kept, group, dout, dfinal):
    """The gradients of q, k, v, lam, tau, gamma, beta, and of the state [B, H, ...]; those of tau,
    gamma and beta by head of each sequence."""
    (B, H, L, F), K = q.shape, len(tau)
    A, C, M = B * H, kept_states(L, K, group), kept[0].shape[-1]
    tokens = [torch.empty_like(x) for x in (q, k, v)]
    shared = [new(tau, A, K), new(tau, A, F), new(tau, A, F)]
    d_state = [new(d, *d.shape) for d in dfinal]
    work = [new(d, *d.shape) for d in dfinal[:3]] + [new(tau, A, M, K) for _ in range(3)]
    dlam = torch.empty_like(lam_AL)
    mlp_backward[A,](
        q, k, v, lam_AL, tau, gamma, beta, *state[:3], *kept, dout,
        *tokens, dlam, *shared, *d_state, *dfinal, *work, L, C, H, crowded(A),
        *strides(q, k, v, dout, *tokens), *(stride for W in state[:3] for stride in W.stride()[:2]),
        F=F, P=padded(F), M=M, K=K, GROUP=group, DOT=TRITON_DTYPE[kept[0].dtype],
        BM=min(TILES // (K * padded(F)), 64), **FMA,
    )  # fmt: skip
    return *tokens, dlam, *shared, d_state
