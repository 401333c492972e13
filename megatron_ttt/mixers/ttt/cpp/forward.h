// A head's forward. The output layer is the same for both inner models: W [J, F], whose last row is
// the bias, takes the hidden layers X of keys and Xbar of queries, which end in a constant 1, to Z
// and Zbar. TTT-Linear's hidden layers are the tokens; TTT-MLP's are gelu(Z1) with Z1 = x V + c,
// and for the queries gelu(Z1bar) with Z1bar = q V + c - P1 G1, which is after the inner step.
//
// Sizes: F features, M hidden width (0 for TTT-Linear), I = M or else F, J = I + 1, K tokens of a
// mini-batch, of which r are there; E = F and P = K padded to LANES. How matrices lie:
//
// - x, q, Z, G..: a token a row, [K, E];
// - S, eta, P1, P2: pairs of a key, the row, and a query, [K, P]; G1, D2..: hidden layers, [I, P];
// - xq, X, Z1, D, dX: hidden layers of keys and, P columns on, of queries, [I or J, 2 P];
// - T at the end of a name: its transpose.
//
// What the backward sums over columns is 0 in those of missing tokens: a ragged end comes first.

#pragma once

#include <vector>

#include "vector.h"

// A tensor [B, H, L, ...], neighbours in its last dimension.
struct Tokens {
  float* data;
  Size batch, head, token;
};

// As in scan.py. Other tensors than Tokens are contiguous; A = B * H, the heads of all sequences.
struct Arguments {
  Size heads, length, features, hidden, mini_batch, group;  // H, L, F, M, K
  Tokens q, k, v, lam, output, d_output, dq, dk, dv, dlam;  // lam and dlam are [B, H, L]
  float *const *kept;                                       // a vector for each group of each head
  const float *tau, *gamma, *beta;                          // [K], [H, F], [H, F]
  float *dtau, *dgamma, *dbeta;                             // [A, K], [A, F], [A, F]
  const float *W1, *b1, *W2, *b2;                           // V^T, c, W but its last row, and that:
  float *W1_final, *b1_final, *W2_final, *b2_final;         // [A, F, M], [A, M], [A, I, F], [A, F]
  float *dW1, *db1, *dW2, *db2;
  const float *dW1_final, *db1_final, *dW2_final, *db2_final;
};

struct Sizes {
  explicit Sizes(const Arguments& s)
      : F(s.features), M(s.hidden), I(M ? M : F), J(I + 1), K(s.mini_batch), E(padded(F)),
        P(padded(K)), group(s.group), all((s.length + K - 1) / K) {}

  // Floats kept for a group: W and V after it, then of each mini-batch Z, Zbar and Z1 with Z1bar.
  Size kept_state() const { return J * E + M * E; }
  Size kept_of_mini_batch() const { return 2 * K * E + 2 * M * P; }
  Size kept() const { return kept_state() + group * kept_of_mini_batch(); }

  const Size F, M, I, J, K, E, P, group, all;  // the last two in mini-batches
};

using Buffer = std::vector<float>;

class Forward : protected Sizes {
 public:
  explicit Forward(const Arguments& arguments)
      : Sizes(arguments), s(arguments), gamma(E), beta(E), tau(P), lam(P), rate(P), x(K * E),
        q(K * E), offset(K * E), step(K * E), Z(K * E), Zbar(K * E), hat(K * E), u(K * E), G(K * E),
        rstd(K), S(K * P), eta(K * P), P1(K * P), S2(K * P), P2(K * P), xq(2 * (F + 1) * P),
        hidden(M ? 2 * J * P : 0), Z1(2 * M * P), D(2 * M * P), G1(M * P), GT(E * P), W(J * E),
        V(M * E), c(M), X(M ? hidden : xq) {
    std::fill_n(&X[I * 2 * P], 2 * P, 1.0f);
  }

  // Head a of A through its sequence.
  void forward(Size a) {
    start(a);
    load_state(s.W1, s.b1, s.W2, s.b2, V, c, W);
    for (Size i = 0; i < all; ++i) {
      load(i);
      answer();
      for (Size t = 0; t < r; ++t) write_output(t);
      if (r == K) take_step();  // a ragged end takes none
      float* kept = kept_of(i);
      for (const Buffer* b : {&Z, &Zbar, &Z1}) kept = std::copy(b->begin(), b->end(), kept);
      if (ends_group(i)) std::copy(V.begin(), V.end(), std::copy(W.begin(), W.end(), group_of(i)));
    }
    store_state(V, c, W, s.W1_final, s.b1_final, s.W2_final, s.b2_final);
  }

 protected:
  void start(Size of_all) {
    a = of_all;
    std::copy_n(s.gamma + a % s.heads * F, F, gamma.begin());
    std::copy_n(s.beta + a % s.heads * F, F, beta.begin());
    std::copy_n(s.tau, K, tau.begin());
  }

  // Take the tokens of a mini-batch; do what needs no state.
  void load(Size mini_batch) {
    first = mini_batch * K;
    r = std::min(K, s.length - first);
    for (Size t = 0; t < K; ++t) {
      lam[t] = t < r ? *token(s.lam, t) : 0;
      rate[t] = -tau[K - 1] * lam[t];
      const float *q_t = token(s.q, t), *x_t = token(s.k, t), *v_t = token(s.v, t);
      for (Size f = 0; f < F; ++f) {
        xq[f * 2 * P + t] = x[t * E + f] = t < r ? x_t[f] : 0;
        xq[f * 2 * P + P + t] = q[t * E + f] = t < r ? q_t[f] : 0;
        offset[t * E + f] = t < r ? beta[f] - v_t[f] + x_t[f] : 0;
      }
    }
    set(r, P, F, pairs(S), rows(x), queries(xq));
    for (Size t = 0; t < r; ++t)
      for (Size i = 0; i < P; ++i) {
        eta[t * P + i] = t <= i && i < r ? tau[i] * lam[t] : 0;
        P1[t * P + i] = eta[t * P + i] * (S[t * P + i] += 1);
      }
  }

  // Z and Zbar, and what leads to them.
  void answer() {
    if (M) {
      set(M, 2 * P, F, keys(Z1), rows(V), keys(xq));
      for (Size j = 0; j < M; ++j)
        for (Size i = 0; i < 2 * P; i += WIDTH) {
          Vector z = at(&Z1[j * 2 * P + i]) += c[j];
          if (i >= P) continue;
          Gelu of_key = gelu(z);
          at(&X[j * 2 * P + i]) = of_key.value;
          at(&D[j * 2 * P + i]) = of_key.first;
        }
    }
    set(r, E, J, rows(Z), keys(X).T(), rows(W));
    inner_gradients();
    if (M) {
      add(M, P, r, queries(Z1), pairs(G1), pairs(P1), -1);
      for (Size j = 0; j < M; ++j)
        for (Size i = P; i < 2 * P; i += WIDTH)
          at(&X[j * 2 * P + i]) = gelu(at(&Z1[j * 2 * P + i])).value;
    }
    rates_of_output_layer();
    set(r, E, J, rows(Zbar), queries(X).T(), rows(W));
    add(r, E, r, rows(Zbar), pairs(P2).T(), rows(G), -1);
  }

  // G, of Z, and G1, of the keys' slopes D.
  void inner_gradients() {
    for (Size t = 0; t < r; ++t) inner_gradient(t);
    if (!M) return;
    flip(G, E, GT);
    set(M, P, F, pairs(G1), rows(W), pairs(GT));
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) G1[j * P + i] *= D[j * 2 * P + i];
  }

  // S2 = X Xbar^T and P2 = eta S2; TTT-Linear has them already.
  void rates_of_output_layer() {
    if (M) {
      set(r, P, J, pairs(S2), keys(X).T(), queries(X));
      for (Size i = 0; i < r * P; ++i) P2[i] = eta[i] * S2[i];
    } else {
      S2 = S, P2 = P1;
    }
  }

  void take_step() {
    scale_rows(G);
    add(J, E, K, rows(W), keys(X), rows(step));
    if (!M) return;
    scale_rows(x);
    add(M, E, K, rows(V), pairs(G1), rows(step));
    for (Size j = 0; j < M; ++j) c[j] += dot(&G1[j * P], rate.data(), P);
  }

  // step = rate y, row by row.
  void scale_rows(const Buffer& y) {
    for (Size t = 0; t < K; ++t)
      for (Size f = 0; f < E; ++f) step[t * E + f] = rate[t] * y[t * E + f];
  }

  // LayerNorm's z_hat; returns 1/s.
  float normalise(const float* z, float* z_hat) const {
    float mean = sum(z, E) / F;
    for (Size f = 0; f < F; ++f) z_hat[f] = z[f] - mean;
    float inverse = 1 / std::sqrt(dot(z_hat, z_hat, E) / F + 1e-6f);
    for (Size f = 0; f < F; ++f) z_hat[f] *= inverse;
    return inverse;
  }

  // Pi(y) / s, LayerNorm's backward.
  void project(const float* y, const float* z_hat, float inverse, float* out) const {
    float mean = sum(y, E) / F, along = dot(y, z_hat, E) / F;
    for (Size f = 0; f < F; ++f) out[f] = (y[f] - mean - along * z_hat[f]) * inverse;
  }

  // G = dl/dZ = Pi(u) / s with u = gamma (gamma LN(Z) + offset), offset = beta - (v - x).
  void inner_gradient(Size t) {
    float *h = &hat[t * E], *y = &u[t * E];
    rstd[t] = normalise(&Z[t * E], h);
    for (Size f = 0; f < F; ++f) y[f] = gamma[f] * (gamma[f] * h[f] + offset[t * E + f]);
    project(y, h, rstd[t], &G[t * E]);
  }

  void write_output(Size t) {
    normalise(&Zbar[t * E], &hat[t * E]);
    float* out = token(s.output, t);
    for (Size f = 0; f < F; ++f) out[f] = q[t * E + f] + gamma[f] * hat[t * E + f] + beta[f];
  }

  // y^T of the r rows there are.
  void flip(const Buffer& y, Size n, Buffer& y_T) const {
    transpose(r, n, y.data(), n, y_T.data(), P);
  }

  // A state, or its gradient, from how it is known outside and back.
  void load_state(const float* W1, const float* b1, const float* W2, const float* b2, Buffer& V,
                  Buffer& c, Buffer& W) const {
    for (Size j = 0; j < I; ++j) std::copy_n(W2 + (a * I + j) * F, F, &W[j * E]);
    std::copy_n(b2 + a * F, F, &W[I * E]);
    if (!M) return;
    transpose(F, M, W1 + a * F * M, M, V.data(), E);
    std::copy_n(b1 + a * M, M, c.begin());
  }
  void store_state(const Buffer& V, const Buffer& c, const Buffer& W, float* W1, float* b1,
                   float* W2, float* b2) const {
    for (Size j = 0; j < I; ++j) std::copy_n(&W[j * E], F, W2 + (a * I + j) * F);
    std::copy_n(&W[I * E], F, b2 + a * F);
    if (!M) return;
    transpose(M, F, V.data(), E, W1 + a * F * M, M);
    std::copy_n(c.begin(), M, b1 + a * M);
  }

  bool ends_group(Size mini_batch) const {
    return (mini_batch + 1) % group == 0 || mini_batch + 1 == all;
  }
  float* group_of(Size mini_batch) const {
    return s.kept[a * ((all + group - 1) / group) + mini_batch / group];
  }
  float* kept_of(Size mini_batch) const {
    return group_of(mini_batch) + kept_state() + mini_batch % group * kept_of_mini_batch();
  }

  float* token(const Tokens& x, Size t) const {
    return x.data + a / s.heads * x.batch + a % s.heads * x.head + (first + t) * x.token;
  }

  Matrix rows(Buffer& b) const { return {b.data(), E}; }
  Matrix pairs(Buffer& b) const { return {b.data(), P}; }
  Matrix keys(Buffer& b) const { return {b.data(), 2 * P}; }
  Matrix queries(Buffer& b) const { return {b.data() + P, 2 * P}; }

  const Arguments& s;
  Size a = 0, first = 0, r = 0;
  Buffer gamma, beta, tau, lam, rate, x, q, offset, step, Z, Zbar, hat, u, G, rstd;
  Buffer S, eta, P1, S2, P2, xq, hidden, Z1, D, G1, GT, W, V, c;
  Buffer& X;
};
