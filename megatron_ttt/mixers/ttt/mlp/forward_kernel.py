"""TTT-MLP in Triton, the forward.

`kernels.py` has the design and the sizes, `../triton/common.py` the names.
"""

import torch
import triton
import triton.language as tl

from megatron_ttt.mixers.ttt.mlp.kernels import copy_state, load_block, store_block
from megatron_ttt.mixers.ttt.triton.common import (
    TRITON_DTYPE,
    autotuned,
    crowded,
    dot,
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
from megatron_ttt.ops.triton.gelu import gelu_derivative, gelu_gate

CHOICES = [{"BM": 64, "num_warps": 4}, {"BM": 64, "num_warps": 8}, {"BM": 256, "num_warps": 16}]


@autotuned(CHOICES, key=["F", "M", "K", "crowded"])
@triton.jit(do_not_specialize=["L", "C", "H", "crowded"])
def mlp_forward(
    q_BHLF, k_BHLF, v_BHLF, lam_AL, tau_K, gamma_HF, beta_HF,
    W1_BHFM, b1_BH1M, W2_BHMF, b2_BH1F, out_BHLF,
    X2_ALM, G1_ALM, G2_ALF, Z2_ALF, Zbar_ALF, S2_ALK, W1_ACFM, b1_ACM, W2_ACMF, b2_ACF,
    W1_final_AFM, b1_final_AM, W2_final_AMF, b2_final_AF,
    L, C, H, crowded,
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
    causal, tau, tau_last, gamma, beta = of_head(
        tau_K, gamma_HF, beta_HF, head, index, features, F, K
    )
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
        q, k, v, lam_AL, tau, gamma, beta, *state, out, *kept, *final, L, C, H, crowded(A),
        *strides(q, k, v, out), *(stride for W in state for stride in W.stride()[:2]),
        F=F, P=padded(F), M=M, K=K, GROUP=group, KEEP=keep, DOT=TRITON_DTYPE[DOT], **FMA,
    )  # fmt: skip
    return out, final, kept
