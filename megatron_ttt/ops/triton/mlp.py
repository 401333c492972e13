"""TTT-MLP in Triton, forward and backward (docs/mathematics.md).

As in `linear.py` one program takes one head of one sequence, nothing crosses programs, and the
backward takes the steps back from kept states. Its state is the difficulty: W1 and W2 are 128 KiB
in float32 at F = 64, four such with their gradients 256 KiB, all the registers of a multiprocessor;
at F = 96 they are 288 and 576 KiB.

- The state lives in global memory, which for the programs that run at a time is the L2 cache
  (132 x 256 KiB = 33 MiB at F = 64), and blocks of BM hidden units pass through the registers. The
  hidden units meet only in sums over M: once for G2 and once for the output, so a mini-batch is two
  passes over the blocks.
- Where both W fit in the registers (F <= 64), the forward may hold them there, RESIDENT, all M
  hidden units one block. That saves 384 KiB of traffic a mini-batch and leaves a multiprocessor one
  program of 16 warps, 128 registers a thread and 1.2 KiB of them spilled (sm_90), where blocks of
  64 run in 4 warps and spill 0.2 KiB. Which is faster is for autotuning to say.
- The hidden units of one head are not spread over programs: these would have to meet twice in every
  mini-batch through global memory, and batch times heads fills the device anyway.
- Kept are, of each token, X2, G1 and G2 as the products see them (exact steps back want the very
  operands), Z2, Zbar2 and S2: 27 KiB a mini-batch (K = 16, F = 64, bf16), and every GROUP
  mini-batches the state, 8 KiB a mini-batch at 16. Every state would be 129 KiB. Without Z2, Zbar2
  and S2 the backward would make a third pass over the blocks.

Sizes: A = B * H heads of sequences, L sequence, F head dim, M hidden width, P >= F a power of two,
K mini-batch, C kept states. Tiles of both W are [BM, P].
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

FORWARD = [{"BM": 64, "num_warps": 4}, {"BM": 64, "num_warps": 8}, {"BM": 256, "num_warps": 16}]
BACKWARD = [{"BM": 64, "num_warps": 4}, {"BM": 64, "num_warps": 8}]

CUBIC = tl.constexpr(0.044715)
TWICE_C = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)


@triton.jit
def gelu_gate(z):
    """g = sigmoid(2c (z + a z^3)): gelu(z) = z g."""
    return 1 / (1 + tl.exp(z * (1 + z * z * CUBIC) * -TWICE_C))


@triton.jit
def gelu_slope(z):
    """The slope p of the gate's argument."""
    return (1 + z * z * (3 * CUBIC)) * TWICE_C


@triton.jit
def gelu_derivative(z, gate):
    return gate + z * gate * (1 - gate) * gelu_slope(z)


@triton.jit
def gelu_second_derivative(z, gate):
    p = gelu_slope(z)
    return gate * (1 - gate) * (2 * p + z * z * (6 * CUBIC * TWICE_C) + (1 - 2 * gate) * z * p * p)


@triton.jit
def load_block(W1_FM, b1_M, W2_MF, m, units, features, F: tl.constexpr, M: tl.constexpr):
    """Hidden units m.. of a state (or its gradient): W1 transposed [BM, P], b1 [BM, 1], W2."""
    here = m + units < M
    inside = here & (features < F)
    W1 = tl.load(W1_FM + features * M + m + units, mask=inside, other=0.0)
    b1 = tl.load(b1_M + m + units, mask=here, other=0.0)
    W2 = tl.load(W2_MF + (m + units) * F + features, mask=inside, other=0.0)
    return W1, b1, W2


@triton.jit
def store_block(
    W1_FM, b1_M, W2_MF, W1, b1, W2, m, units, features, F: tl.constexpr, M: tl.constexpr
):
    here = m + units < M
    inside = here & (features < F)
    tl.store(W1_FM + features * M + m + units, W1, mask=inside)
    tl.store(b1_M + m + units, b1, mask=here)
    tl.store(W2_MF + (m + units) * F + features, W2, mask=inside)


@triton.jit
def copy_state(
    to_W1, to_b1, to_W2, W1_FM, b1_M, W2_MF, units, features,
    F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    for m in range(0, M, BM):
        W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, features, F, M)
        store_block(to_W1, to_b1, to_W2, W1, b1, W2, m, units, features, F, M)


@autotuned(FORWARD, key=["F", "M", "K", "KEEP"])
@triton.jit(do_not_specialize=["L", "C"])
def mlp_forward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF,
    W1_BHFM, b1_BH1M, W2_BHMF, b2_BH1F, out_BHLF,
    X2_ALM, G1_ALM, G2_ALF, Z2_ALF, Zbar_ALF, S2_ALK, W1_ACFM, b1_ACM, W2_ACMF, b2_ACF,
    W1_final_AFM, b1_final_AM, W2_final_AMF, b2_final_AF,
    L, C, H,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    W1_b, W1_h, b1_b, b1_h, W2_b, W2_h, b2_b, b2_h,
    F: tl.constexpr, P: tl.constexpr, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid [A]. KEEP: write what the backward wants, from X2_ALM to b2_ACF."""
    RESIDENT: tl.constexpr = BM >= M
    a = tl.program_id(0).to(tl.int64)
    batch, head = a // H, a % H
    q_LF = q_BHLF + batch * q_b + head * q_h
    k_LF = k_BHLF + batch * k_b + head * k_h
    v_LF = v_BHLF + batch * v_b + head * v_h
    out_LF = out_BHLF + batch * out_b + head * out_h
    lam_L = lam_AL + a * L
    X2_LM, G1_LM, S2_LK = X2_ALM + a * L * M, G1_ALM + a * L * M, S2_ALK + a * L * K
    G2_LF, Z2_LF, Zbar_LF = G2_ALF + a * L * F, Z2_ALF + a * L * F, Zbar_ALF + a * L * F
    W1_FM, b1_M, W2_MF = W1_final_AFM + a * F * M, b1_final_AM + a * M, W2_final_AMF + a * M * F
    W1_initial = W1_BHFM + batch * W1_b + head * W1_h
    b1_initial = b1_BH1M + batch * b1_b + head * b1_h
    W2_initial = W2_BHMF + batch * W2_b + head * W2_h

    index, features, units = tl.arange(0, K), tl.arange(0, P)[:, None], tl.arange(0, BM)[:, None]
    row_features = tl.arange(0, P)[None, :]
    real = features < F
    causal = index[:, None] <= index[None, :]  # key, query
    tau = tl.load(tau_K + index)
    tau_last = tl.load(tau_K + K - 1)
    gamma = tl.load(gamma_HF + head * F + features, mask=real, other=0.0)
    beta = tl.load(beta_HF + head * F + features, mask=real, other=0.0)
    b2 = tl.load(b2_BH1F + batch * b2_b + head * b2_h + features, mask=real, other=0.0)
    if RESIDENT:
        W1, b1, W2 = load_block(W1_initial, b1_initial, W2_initial, 0, units, row_features, F, M)
    else:
        copy_state(
            W1_FM, b1_M, W2_MF, W1_initial, b1_initial, W2_initial, units, row_features, F, M, BM
        )
        tl.debug_barrier()

    N = tl.cdiv(L, K)
    for c in range(C):
        for n in range(c * GROUP, tl.minimum((c + 1) * GROUP, N)):
            tokens = n * K + index.to(tl.int64)
            here = tokens < L
            lam = tl.load(lam_L + tokens, mask=here, other=0.0)
            tokens, here = tokens[None, :], here[None, :]
            inside = here & real
            q = load_tokens(q_LF, features, tokens, q_l, inside)
            x = load_tokens(k_LF, features, tokens, k_l, inside)
            v = load_tokens(v_LF, features, tokens, v_l, inside)
            eta = tl.where(causal, lam[:, None] * tau[None, :], 0.0)
            PS1 = eta * (dot(tl.trans(x), q, DOT) + 1)
            # After a ragged mini-batch the state stays.
            rate = (tl.where((n + 1) * K <= L, tau_last, 0.0) * lam)[None, :]

            Z2 = tl.zeros((P, K), tl.float32) + b2
            if RESIDENT:
                Z1 = dot(W1, x, DOT) + b1
                Z2 += dot(tl.trans(W2), Z1 * gelu_gate(Z1), DOT)
            else:
                for m in range(0, M, BM):
                    W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, row_features, F, M)
                    Z1 = dot(W1, x, DOT) + b1
                    Z2 += dot(tl.trans(W2), Z1 * gelu_gate(Z1), DOT)
            hat, rstd = normalise(Z2, features, F, P)
            u = gamma * (gamma * hat + beta + x - v)
            G2 = operand(project(u, hat, rstd, features, F, P), DOT)

            S2 = tl.zeros((K, K), tl.float32) + 1
            Zbar = tl.zeros((P, K), tl.float32) + b2
            for m in range(0, M, BM):
                if not RESIDENT:
                    W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, row_features, F, M)
                    Z1 = dot(W1, x, DOT) + b1
                gate = gelu_gate(Z1)
                X2 = operand(Z1 * gate, DOT)
                G1 = operand(dot(W2, G2, DOT) * gelu_derivative(Z1, gate), DOT)
                Z1bar = dot(W1, q, DOT) + b1 - dot(G1, PS1, DOT)
                X2bar = Z1bar * gelu_gate(Z1bar)
                S2 += dot(tl.trans(X2), X2bar, DOT)
                Zbar += dot(tl.trans(W2), X2bar, DOT)
                W1 -= dot(G1, tl.trans(rate * x), DOT)
                b1 -= tl.sum(rate * G1, 1)[:, None]
                W2 -= dot(rate * X2, tl.trans(G2), DOT)
                if not RESIDENT:
                    store_block(W1_FM, b1_M, W2_MF, W1, b1, W2, m, units, row_features, F, M)
                if KEEP:
                    hidden = here & (m + units < M)
                    tl.store(X2_LM + tokens * M + m + units, X2, mask=hidden)
                    tl.store(G1_LM + tokens * M + m + units, G1, mask=hidden)
            if not RESIDENT:
                tl.debug_barrier()  # the blocks are read again by other threads
            Zbar -= dot(G2, eta * S2, DOT)
            b2 -= tl.sum(rate * G2, 1)[:, None]
            hat, _ = normalise(Zbar, features, F, P)
            out = q + gamma * hat + beta
            tl.store(out_LF + tokens * out_l + features, out, mask=inside)
            if KEEP:
                tl.store(G2_LF + tokens * F + features, G2, mask=inside)
                tl.store(Z2_LF + tokens * F + features, Z2, mask=inside)
                tl.store(Zbar_LF + tokens * F + features, Zbar, mask=inside)
                tl.store(S2_LK + tokens * K + index[:, None], S2, mask=here)

        if KEEP:
            kept = a * C + c
            W1_kept, b1_kept = W1_ACFM + kept * F * M, b1_ACM + kept * M
            W2_kept = W2_ACMF + kept * M * F
            if RESIDENT:
                store_block(W1_kept, b1_kept, W2_kept, W1, b1, W2, 0, units, row_features, F, M)
            else:
                copy_state(
                    W1_kept, b1_kept, W2_kept, W1_FM, b1_M, W2_MF, units, row_features, F, M, BM
                )
            tl.store(b2_ACF + kept * F + features, b2, mask=real)

    if RESIDENT:
        store_block(W1_FM, b1_M, W2_MF, W1, b1, W2, 0, units, row_features, F, M)
    tl.store(b2_final_AF + a * F + features, b2, mask=real)


@autotuned(BACKWARD, key=["F", "M", "K"])
@triton.jit(do_not_specialize=["L", "C"])
def mlp_backward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF,
    X2_ALM, G1_ALM, G2_ALF, Z2_ALF, Zbar_ALF, S2_ALK, W1_ACFM, b1_ACM, W2_ACMF, b2_ACF, dout_BHLF,
    dq_BHLF, dk_BHLF, dv_BHLF, dlam_AL, dtau_AK, dgamma_AF, dbeta_AF,
    dW1_AFM, db1_AM, dW2_AMF, db2_AF,
    dW1_final_AFM, db1_final_AM, dW2_final_AMF, db2_final_AF,
    W1_AFM, b1_AM, W2_AMF, dX2_AMK, dZ1_AMK, slope_AMK,
    L, C, H,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
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
    causal = index[:, None] <= index[None, :]  # key, query
    tau = tl.load(tau_K + index)
    tau_last = tl.load(tau_K + K - 1)
    gamma = tl.load(gamma_HF + head * F + features, mask=real, other=0.0)
    beta = tl.load(beta_HF + head * F + features, mask=real, other=0.0)
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
        copy_state(
            W1_FM, b1_M, W2_MF, W1_ACFM + kept * F * M, b1_ACM + kept * M, W2_ACMF + kept * M * F,
            units, row_features, F, M, BM,
        )  # fmt: skip
        tl.debug_barrier()
        first = (C - 1 - c) * GROUP
        last = tl.minimum(first + GROUP, N) - 1
        for n in range(last, first - 1, -1):
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

            # M2 to M5, over the hidden units; the state steps back.
            dP1 = tl.zeros((K, K), tl.float32)
            YG = tl.zeros((K,), tl.float32)
            dq, dx = dout, tl.zeros((P, K), tl.float32)
            Y2 = tl.zeros((P, K), tl.float32) + db2
            for m in range(0, M, BM):
                hidden = here & (m + units < M)
                X2 = load_tokens(X2_LM, m + units, tokens, M, hidden)
                G1 = load_tokens(G1_LM, m + units, tokens, M, hidden)
                W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, row_features, F, M)
                W1 += dot(G1, tl.trans(rate * x), DOT)
                b1 += tl.sum(rate * G1, 1)[:, None]
                W2 += dot(rate * X2, tl.trans(G2), DOT)
                store_block(W1_FM, b1_M, W2_MF, W1, b1, W2, m, units, row_features, F, M)

                dW1, db1, dW2 = load_block(dW1_FM, db1_M, dW2_MF, m, units, row_features, F, M)
                Z1bar = dot(W1, q, DOT) + b1 - dot(G1, PS1, DOT)
                gate = gelu_gate(Z1bar)
                X2bar = Z1bar * gate
                dZ1bar = dot(W2, dZbar, DOT) + dot(X2, dS2, DOT)
                dZ1bar *= gelu_derivative(Z1bar, gate)
                dX2 = dot(X2bar, tl.trans(dS2), DOT) - rate * dot(dW2, G2, DOT)
                Y2 += dot(tl.trans(dW2), X2, DOT)
                Y1 = dot(dW1, x, DOT) + db1
                YG += tl.sum(Y1 * G1, 0)
                dP1 -= dot(tl.trans(G1), dZ1bar, DOT)
                dG1 = -dot(dZ1bar, tl.trans(PS1), DOT) - rate * Y1
                dq += dot(tl.trans(W1), dZ1bar, DOT)
                dx -= rate * dot(tl.trans(dW1), G1, DOT)

                Z1 = dot(W1, x, DOT) + b1
                gate = gelu_gate(Z1)
                slope = gelu_derivative(Z1, gate)
                dZ1 = dG1 * dot(W2, G2, DOT) * gelu_second_derivative(Z1, gate)
                dH = dG1 * slope
                dG2 += dot(tl.trans(W2), dH, DOT)
                dW1 += dot(dZ1bar, tl.trans(q), DOT)
                db1 += tl.sum(dZ1bar, 1)[:, None]
                dW2 += dot(X2bar, tl.trans(dZbar), DOT) + dot(dH, tl.trans(G2), DOT)
                store_block(dW1_FM, db1_M, dW2_MF, dW1, db1, dW2, m, units, row_features, F, M)
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
                W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, row_features, F, M)
                dX2 = tl.load(dX2_MK + tile, mask=inside_M, other=0.0) + dot(W2, dZ2, DOT)
                slope = tl.load(slope_MK + tile, mask=inside_M, other=0.0)
                dZ1 = tl.load(dZ1_MK + tile, mask=inside_M, other=0.0) + dX2 * slope
                dx += dot(tl.trans(W1), dZ1, DOT)
                X2 = load_tokens(X2_LM, m + units, tokens, M, hidden)
                dW1, db1, dW2 = load_block(dW1_FM, db1_M, dW2_MF, m, units, row_features, F, M)
                dW1 += dot(dZ1, tl.trans(x), DOT)
                db1 += tl.sum(dZ1, 1)[:, None]
                dW2 += dot(X2, tl.trans(dZ2), DOT)
                store_block(dW1_FM, db1_M, dW2_MF, dW1, db1, dW2, m, units, row_features, F, M)
            tl.debug_barrier()
            tl.store(dk_LF + tokens * dk_l + features, dx, mask=inside)

    tl.store(db2_AF + a * F + features, db2, mask=real)
    tl.store(dtau_AK + a * K + index, dtau)
    tl.store(dgamma_AF + a * F + features, dgamma, mask=real)
    tl.store(dbeta_AF + a * F + features, dbeta, mask=real)


def forward(q, k, v, lam_AL, tau, gamma, beta, state, group, keep):
    """The outputs, the final state, and what `backward` wants back (nothing unless `keep`)."""
    (B, H, L, F), K, M = q.shape, len(tau), state[0].shape[-1]
    A, C = B * H, kept_states(L, K, group)
    out = torch.empty_like(q)
    final = [new(W, B, H, *W.shape[2:]) for W in state]
    DOT = operand_dtype(q, k, v)
    A_kept = A if keep else 0
    kept = [q.new_empty((A_kept, L, width), dtype=DOT) for width in (M, M, F)]
    kept += [new(tau, A_kept, L, width) for width in (F, F, K)]
    kept += [new(W, A_kept, C, *W.shape[2:]) for W in state]
    mlp_forward[A,](
        q, k, v, lam_AL, tau, gamma, beta, *state, out, *kept, *final, L, C, H,
        *strides(q, k, v, out), *(stride for W in state for stride in W.stride()[:2]),
        F=F, P=padded(F), M=M, K=K, GROUP=group, KEEP=keep, DOT=TRITON_DTYPE[DOT],
    )  # fmt: skip
    return out, final, kept


def backward(q, k, v, lam_AL, tau, gamma, beta, kept, group, dout, dfinal):
    """The gradients of q, k, v, lam, tau, gamma, beta, and of the state [B, H, ...]; those of tau,
    gamma and beta by head of each sequence."""
    (B, H, L, F), K = q.shape, len(tau)
    A, C, M = B * H, kept_states(L, K, group), kept[0].shape[-1]
    tokens = [torch.empty_like(x) for x in (q, k, v)]
    shared = [new(tau, A, K), new(tau, A, F), new(tau, A, F)]
    state = [new(d, *d.shape) for d in dfinal]
    work = [new(d, *d.shape) for d in dfinal[:3]] + [new(tau, A, M, K) for _ in range(3)]
    dlam = torch.empty_like(lam_AL)
    mlp_backward[A,](
        q, k, v, lam_AL, tau, gamma, beta, *kept, dout,
        *tokens, dlam, *shared, *state, *dfinal, *work, L, C, H,
        *strides(q, k, v, dout, *tokens),
        F=F, P=padded(F), M=M, K=K, GROUP=group, DOT=TRITON_DTYPE[kept[0].dtype],
    )  # fmt: skip
    return *tokens, dlam, *shared, state
