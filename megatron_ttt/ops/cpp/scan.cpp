// TTT-Linear and TTT-MLP on a CPU (arXiv 2407.04620, section 2): each thread takes one head after
// another through the whole sequence, so that a head's state and tokens stay in its core's cache.
//
// The output layer is the same for both: W [J, F], whose last row is the bias, takes hidden layers
// X of keys and Xbar of queries, ending in a constant 1, to Z and Zbar. TTT-Linear's hidden layers
// are the tokens themselves; TTT-MLP's are gelu(x V + c), after the inner step for queries.
//
// Sizes: L tokens, K a mini-batch, F features, M hidden width (0 for TTT-Linear), J = M or F, + 1.
// Hidden layers, named X, D, G1.. are [J or M, tokens], with the keys of a mini-batch first and its
// queries P lanes after (P = K padded to lanes); tokens x, q, Z, G.. are [K, F], both padded. A name
// with T is a tensor's transpose. Matrices over pairs of tokens (S, eta) have keys for rows.
//
// The forward keeps Z, Zbar and TTT-MLP's hidden layers before their GELU, and the state after each
// group of mini-batches, from which the backward takes the steps back one by one.

#include <vector>

#include "vector.h"

// A tensor [B, H, L, ...] of neighbours in its last dimension.
struct Tokens {
  float* data;
  Size batch, head, token;
};

// As in scan.py. Other tensors are contiguous, with A = B * H heads of all sequences.
struct Arguments {
  Size heads, length, features, hidden, mini_batch, group;     // H, L, F, M, K
  Tokens q, k, v, lam, output, d_output, dq, dk, dv, dlam;     // lam and dlam have no features
  float *const *kept, *const *kept_states;                     // a matrix a head
  const float *tau, *gamma, *beta;                             // [K], [H, F], [H, F]
  float *dtau, *dgamma, *dbeta;                                // [A, K], [A, F], [A, F]
  const float *W1, *b1, *W2, *b2;                              // [A, F, M], [A, M], [A, I, F], [A, F]
  float *W1_final, *b1_final, *W2_final, *b2_final;            // I = J - 1; layer 1 is TTT-MLP's
  float *dW1, *db1, *dW2, *db2;
  const float *dW1_final, *db1_final, *dW2_final, *db2_final;
};

constexpr float EPSILON = 1e-6f;

class Head {
 public:
  Head(const Arguments& arguments, bool for_backward)
      : s(arguments), F(s.features), M(s.hidden), K(s.mini_batch), P(padded(K)), E(padded(F)),
        I(M ? M : F), J(I + 1), gamma(E), beta(E), tau(P), lam(P), rate(P), x(K * E), q(K * E),
        offset(K * E), step(K * E), stepT(E * P), xq(2 * (F + 1) * P), S(K * P), eta(K * P),
        P1(K * P), S2(K * P), P2(K * P), Z(K * E), Zbar(K * E), hat(K * E), u(K * E), G(K * E),
        GT(E * P), rstd(K), hidden(M ? 2 * J * P : 0), Z1(2 * M * P), D(2 * M * P), G1(M * P),
        W(J * E), V(M * E), c(M) {
    std::fill_n(&xq[F * 2 * P], 2 * P, 1.0f);
    if (M) std::fill_n(&hidden[M * 2 * P], 2 * P, 1.0f);
    X = M ? hidden.data() : xq.data();
    if (!for_backward) return;
    for (auto* b : {&dq, &dx, &dZbar, &dZ, &dG, &Y, &hat_bar}) b->resize(K * E);
    for (auto* b : {&dZT, &dZbarT}) b->resize(E * P);
    for (auto* b : {&dS, &dST, &dP, &dS1, &d_eta, &P1T}) b->resize(std::max(K, P) * P);
    for (auto* b : {&D2, &dG1, &dH}) b->resize(M * P);
    dX.resize(2 * I * P), dW.resize(J * E), dV.resize(M * E), dc.resize(M);
    rstd_bar.resize(K), dgamma.resize(E), dbeta.resize(E), dtau.resize(K), drate.resize(K);
  }

  Size kept_size() const { return 2 * K * E + 2 * M * P; }
  Size state_size() const { return J * E + M * E; }

  void forward(Size a) {
    start(a);
    load_state(s.W1, s.b1, s.W2, s.b2, W, V, c);
    Size whole = s.length / K, all = (s.length + K - 1) / K;
    if (whole == 0) keep_state(0);
    for (Size i = 0; i < all; ++i) {
      load(i);
      answer();
      for (Size t = 0; t < r; ++t) write_output(t);
      float* kept = s.kept[a] + i * kept_size();
      std::copy(Z.begin(), Z.end(), kept);
      std::copy(Zbar.begin(), Zbar.end(), kept + K * E);
      std::copy(Z1.begin(), Z1.end(), kept + 2 * K * E);
      if (r < K) break;
      take_step(1);
      if ((i + 1) % s.group == 0 || i + 1 == whole) keep_state(i / s.group);
    }
    store_state(W, V, c, s.W1_final, s.b1_final, s.W2_final, s.b2_final);
  }

  void backward(Size a) {
    start(a);
    load_state(s.dW1_final, s.db1_final, s.dW2_final, s.db2_final, dW, dV, dc);
    for (auto* sums : {&dgamma, &dbeta, &dtau}) std::fill(sums->begin(), sums->end(), 0.0f);
    Size whole = s.length / K, all = (s.length + K - 1) / K;
    for (Size i = all - 1; i >= 0; --i) {
      load(i);
      if (r < K || (i + 1) % s.group == 0 || i + 1 == whole) restore_state(i);
      float* kept = s.kept[a] + i * kept_size();
      std::copy_n(kept, K * E, Z.begin());
      std::copy_n(kept + K * E, K * E, Zbar.begin());
      std::copy_n(kept + 2 * K * E, 2 * M * P, Z1.begin());
      backward_of_mini_batch();
    }
    store_state(dW, dV, dc, s.dW1, s.db1, s.dW2, s.db2);
    std::copy_n(dgamma.begin(), F, s.dgamma + a * F);
    std::copy_n(dbeta.begin(), F, s.dbeta + a * F);
    std::copy_n(dtau.begin(), K, s.dtau + a * K);
  }

 private:
  using Buffer = std::vector<float>;

  void start(Size head) {
    a = head;
    std::copy_n(s.gamma + a % s.heads * F, F, gamma.begin());
    std::copy_n(s.beta + a % s.heads * F, F, beta.begin());
    std::copy_n(s.tau, K, tau.begin());
  }

  // Take the tokens of a mini-batch; do what needs no state. r of K are there.
  void load(Size mini_batch) {
    first = mini_batch * K;
    r = std::min(K, s.length - first);
    for (Size t = 0; t < K; ++t) lam[t] = t < r ? *token(s.lam, t) : 0;
    for (Size t = 0; t < P; ++t) rate[t] = r == K && t < K ? -tau[K - 1] * lam[t] : 0.0f;
    for (Size t = 0; t < K; ++t) {
      const float *q_t = token(s.q, t), *x_t = token(s.k, t), *v_t = token(s.v, t);
      for (Size f = 0; f < F; ++f) {
        xq[f * 2 * P + t] = x[t * E + f] = t < r ? x_t[f] : 0;
        xq[f * 2 * P + P + t] = q[t * E + f] = t < r ? q_t[f] : 0;
        offset[t * E + f] = t < r ? beta[f] - v_t[f] + x_t[f] : 0;
      }
    }
    product(r, P, F, rows(x), queries(xq.data()), 1, S.data(), P, false);
    for (Size t = 0; t < r; ++t)
      for (Size i = 0; i < P; ++i) {
        eta[t * P + i] = t <= i && i < r ? tau[i] * lam[t] : 0.0f;
        P1[t * P + i] = eta[t * P + i] * (S[t * P + i] += 1);
      }
  }

  // Z, Zbar and what leads to them.
  void answer() {
    if (M) {
      product(M, 2 * P, F, {V.data(), E}, {xq.data(), 2 * P}, 1, Z1.data(), 2 * P, false);
      for (Size j = 0; j < M; ++j) {
        float* z = &Z1[j * 2 * P];
        for (Size i = 0; i < 2 * P; i += WIDTH) at(z + i) += c[j];
        for (Size i = 0; i < P; i += WIDTH) {
          Gelu of_z = gelu(at(z + i));
          at(X + j * 2 * P + i) = of_z.value;
          at(&D[j * 2 * P + i]) = of_z.first;
        }
      }
    }
    product(r, E, J, keys(X).T(), rows(W), 1, Z.data(), E, false);
    for (Size t = 0; t < r; ++t) inner_gradient(t);
    flip(G, E, GT);
    if (M) {
      hidden_gradient();
      product(M, P, r, pairs(G1), pairs(P1), -1, &Z1[P], 2 * P, true);
      for (Size j = 0; j < M; ++j)
        for (Size i = P; i < 2 * P; i += WIDTH)
          at(X + j * 2 * P + i) = gelu(at(&Z1[j * 2 * P + i])).value;
    }
    rates_of_output_layer();
    product(r, E, J, queries(X).T(), rows(W), 1, Zbar.data(), E, false);
    product(r, E, r, pairs(P2).T(), rows(G), -1, Zbar.data(), E, true);
  }

  // G1 = (G W^T) gelu'(Z1).
  void hidden_gradient() {
    product(M, P, F, rows(W), pairs(GT), 1, G1.data(), P, false);
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) G1[j * P + i] *= D[j * 2 * P + i];
  }

  // S2 = X Xbar^T and P2 = eta S2; TTT-Linear has them already.
  void rates_of_output_layer() {
    if (M) {
      product(r, P, J, keys(X).T(), queries(X), 1, S2.data(), P, false);
      for (Size i = 0; i < r * P; ++i) P2[i] = eta[i] * S2[i];
    } else {
      S2 = S, P2 = P1;
    }
  }

  // The state takes the mini-batch's step, or takes it back.
  void take_step(float sign) {
    scale_rows(G);
    product(J, E, K, keys(X), rows(step), sign, W.data(), E, true);
    if (M) {
      take_hidden_step(sign);
      for (Size j = 0; j < M; ++j) c[j] += sign * dot(&G1[j * P], rate.data(), P);
    }
  }

  void take_hidden_step(float sign) {
    scale_rows(x);
    product(M, E, K, pairs(G1), rows(step), sign, V.data(), E, true);
  }

  // step = rate y, row by row.
  void scale_rows(const Buffer& y) {
    for (Size t = 0; t < K; ++t)
      for (Size f = 0; f < E; ++f) step[t * E + f] = rate[t] * y[t * E + f];
  }

  float normalise(const float* z, float* z_hat) const {
    float mean = sum(z, E) / F;
    for (Size f = 0; f < F; ++f) z_hat[f] = z[f] - mean;
    float inverse = 1 / std::sqrt(dot(z_hat, z_hat, E) / F + EPSILON);
    for (Size f = 0; f < F; ++f) z_hat[f] *= inverse;
    return inverse;
  }

  // Pi(y) / s, which is LayerNorm's backward.
  void project(const float* y, const float* z_hat, float inverse, float* out) const {
    float mean = sum(y, E) / F, along = dot(y, z_hat, E) / F;
    for (Size f = 0; f < F; ++f) out[f] = (y[f] - mean - along * z_hat[f]) * inverse;
  }

  // G = dl/dZ = Pi(u) / s with u = gamma (gamma LN(Z) + offset).
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

  void backward_of_mini_batch() {
    bool full = r == K;
    for (auto* sums : {&dx, &dG}) std::fill(sums->begin(), sums->end(), 0.0f);
    std::fill(drate.begin(), drate.end(), 0.0f);

    // What the forward had, and its output's gradient as far as Zbar.
    for (Size t = 0; t < r; ++t) {
      inner_gradient(t);
      output_backward(t);
    }
    flip(G, E, GT);
    flip(dZbar, E, dZbarT);
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; i += WIDTH) {
        Gelu of_key = gelu(at(&Z1[j * 2 * P + i]));
        Gelu of_query = gelu(at(&Z1[j * 2 * P + P + i]));
        at(X + j * 2 * P + i) = of_key.value, at(X + j * 2 * P + P + i) = of_query.value;
        at(&D[j * 2 * P + i]) = of_key.first, at(&D[j * 2 * P + P + i]) = of_query.first;
        at(&D2[j * P + i]) = of_key.second;
      }
    rates_of_output_layer();

    // Zbar = Xbar W - P2 G.
    product(r, E, r, pairs(P2), rows(dZbar), -1, dG.data(), E, false);
    product(r, P, F, rows(G), pairs(dZbarT), -1, dP.data(), P, false);
    similarity_backward(S2, dS, false);
    flip(dS, P, dST);
    if (full) {
      scale_rows(G);
      flip(step, E, stepT);
      product(J, E, K, keys(X), rows(step), -1, W.data(), E, true);
    }
    product(I, P, F, rows(W), pairs(dZbarT), 1, &dX[P], 2 * P, false);
    product(I, P, r, keys(X), pairs(dS), 1, &dX[P], 2 * P, true);
    product(I, P, r, queries(X), pairs(dST), 1, &dX[0], 2 * P, false);

    // The step of W: X and G have a part in it.
    if (full) {
      product(I, P, F, rows(dW), pairs(stepT), 1, &dX[0], 2 * P, true);
      product(K, E, J, keys(X).T(), rows(dW), 1, Y.data(), E, false);
      step_backward(G, dG);
    }
    if (M) hidden_step_backward(full);

    // The inner gradient, and Z = X W.
    for (Size t = 0; t < r; ++t) inner_gradient_backward(t);
    flip(dZ, E, dZT);
    product(I, P, F, rows(W), pairs(dZT), 1, &dX[0], 2 * P, true);
    product(J, E, r, keys(X), rows(dZ), 1, dW.data(), E, true);
    product(J, E, r, queries(X), rows(dZbar), 1, dW.data(), E, true);
    if (M) {
      hidden_backward(full);
    } else {
      add_transposed(&dX[0], dx);
      add_transposed(&dX[P], dq);
    }
    write_gradients(full);
  }

  void output_backward(Size t) {
    const float* d_out = token(s.d_output, t);
    float *h = &hat_bar[t * E], *scaled = &Y[t * E];
    rstd_bar[t] = normalise(&Zbar[t * E], h);
    for (Size f = 0; f < F; ++f) {
      dq[t * E + f] = d_out[f];
      dgamma[f] += d_out[f] * h[f];
      dbeta[f] += d_out[f];
      scaled[f] = gamma[f] * d_out[f];
    }
    project(scaled, h, rstd_bar[t], &dZbar[t * E]);
  }

  // From dP of P = eta S to dS, and the part of eta's gradient.
  void similarity_backward(const Buffer& of, Buffer& d_of, bool add) {
    for (Size t = 0; t < r; ++t)
      for (Size i = 0; i < P; ++i) {
        Size ti = t * P + i;
        float d = t <= i && i < r ? dP[ti] * of[ti] : 0.0f;
        d_eta[ti] = add ? d_eta[ti] + d : d;
        d_of[ti] = eta[ti] * dP[ti];
      }
  }

  // Through step = rate y, with Y its gradient.
  void step_backward(const Buffer& y, Buffer& dy) {
    for (Size t = 0; t < K; ++t) {
      drate[t] += dot(&Y[t * E], &y[t * E], E);
      axpy(E, rate[t], &Y[t * E], &dy[t * E]);
    }
  }

  // Zbar1 = q V + c - P1 G1, the step of V and c, and G1.
  void hidden_step_backward(bool full) {
    product(M, P, F, rows(W), pairs(GT), 1, dH.data(), P, false);  // H, for now
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) {
        G1[j * P + i] = dH[j * P + i] * D[j * 2 * P + i];
        D2[j * P + i] *= dH[j * P + i];
        dX[j * 2 * P + P + i] *= D[j * 2 * P + P + i];
      }
    product(r, P, M, pairs(G1).T(), queries(dX.data()), -1, dP.data(), P, false);
    similarity_backward(S, dS1, true);
    flip(P1, P, P1T);
    product(M, P, r, queries(dX.data()), pairs(P1T), -1, dG1.data(), P, false);
    if (full) {
      scale_rows(x);
      flip(step, E, stepT);
      product(M, P, F, rows(dV), pairs(stepT), 1, dG1.data(), P, true);
      product(K, E, M, pairs(G1).T(), rows(dV), 1, Y.data(), E, false);
      step_backward(x, dx);
      for (Size j = 0; j < M; ++j) axpy(P, dc[j], rate.data(), &dG1[j * P]);
      for (Size j = 0; j < M; ++j) axpy(K, dc[j], &G1[j * P], drate.data());
    }
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) {
        dH[j * P + i] = dG1[j * P + i] * D[j * 2 * P + i];
        D2[j * P + i] *= dG1[j * P + i];
      }
    product(r, E, M, pairs(dH).T(), rows(W), 1, dG.data(), E, true);
    product(M, E, r, pairs(dH), rows(G), 1, dW.data(), E, true);
  }

  // From dG to dZ, through G = (u - <u> - hat <u hat>) / s and both places of hat.
  void inner_gradient_backward(Size t) {
    const float *d = &dG[t * E], *h = &hat[t * E], *y = &u[t * E], *g = &G[t * E];
    float *du = &Y[t * E], *d_hat = &dZ[t * E], *d_value = token(s.dv, t);
    float inverse = rstd[t];
    float u_along = dot(y, h, E) / F, d_along = dot(d, h, E) / F, scale = dot(d, g, E) / F;
    project(d, h, inverse, du);
    for (Size f = 0; f < F; ++f) {
      dgamma[f] += du[f] * (2 * gamma[f] * h[f] + offset[t * E + f]);
      float d_offset = gamma[f] * du[f];
      dbeta[f] += d_offset;
      dx[t * E + f] += d_offset;
      d_value[f] = -d_offset;
      d_hat[f] = gamma[f] * d_offset - inverse * (d[f] * u_along + y[f] * d_along);
    }
    project(d_hat, h, inverse, d_hat);
    axpy(F, -inverse * scale, h, d_hat);
  }

  // Z1 = x V + c and Z1bar, from their gelus.
  void hidden_backward(bool full) {
    for (Size j = 0; j < M; ++j) {
      float* d = &dX[j * 2 * P];
      for (Size i = 0; i < P; ++i) d[i] = d[i] * D[j * 2 * P + i] + D2[j * P + i];
      dc[j] += sum(d, 2 * P);
    }
    product(M, E, r, keys(dX.data()), rows(x), 1, dV.data(), E, true);
    product(M, E, r, queries(dX.data()), rows(q), 1, dV.data(), E, true);
    if (full) take_hidden_step(-1);
    product(r, E, M, keys(dX.data()).T(), rows(V), 1, dx.data(), E, true);
    product(r, E, M, queries(dX.data()).T(), rows(V), 1, dq.data(), E, true);
    product(r, E, r, pairs(dS1), rows(q), 1, dx.data(), E, true);
    product(r, E, r, pairs(dS1).T(), rows(x), 1, dq.data(), E, true);
  }

  // dq, dk and dlam; tau's sum. Those of eta_ti = lam_t tau_i and rate_t = -lam_t tau_K.
  void write_gradients(bool full) {
    for (Size t = 0; t < r; ++t) {
      std::copy_n(&dq[t * E], F, token(s.dq, t));
      std::copy_n(&dx[t * E], F, token(s.dk, t));
      float d = dot(&d_eta[t * P], tau.data(), P);
      axpy(r, lam[t], &d_eta[t * P], dtau.data());
      if (full) {
        d -= tau[K - 1] * drate[t];
        dtau[K - 1] -= lam[t] * drate[t];
      }
      *token(s.dlam, t) = d;
    }
  }

  // The state as it is known outside, [F, M], [M], [J - 1, F] and [F], and here.
  void load_state(const float* W1, const float* b1, const float* W2, const float* b2, Buffer& W_,
                  Buffer& V_, Buffer& c_) {
    for (Size j = 0; j < I; ++j) std::copy_n(W2 + (a * I + j) * F, F, &W_[j * E]);
    std::copy_n(b2 + a * F, F, &W_[I * E]);
    if (!M) return;
    transpose(F, M, W1 + a * F * M, M, V_.data(), E);
    std::copy_n(b1 + a * M, M, c_.begin());
  }
  void store_state(const Buffer& W_, const Buffer& V_, const Buffer& c_, float* W1, float* b1,
                   float* W2, float* b2) {
    for (Size j = 0; j < I; ++j) std::copy_n(&W_[j * E], F, W2 + (a * I + j) * F);
    std::copy_n(&W_[I * E], F, b2 + a * F);
    if (!M) return;
    transpose(M, F, V_.data(), E, W1 + a * F * M, M);
    std::copy_n(c_.begin(), M, b1 + a * M);
  }

  float* token(const Tokens& x, Size t) const {
    return x.data + a / s.heads * x.batch + a % s.heads * x.head + (first + t) * x.token;
  }
  float* kept_state(Size group) {
    Size groups = std::max<Size>(1, (s.length / K + s.group - 1) / s.group);
    return s.kept_states[a] + std::min(group, groups - 1) * state_size();
  }
  void keep_state(Size group) {
    std::copy(V.begin(), V.end(), std::copy(W.begin(), W.end(), kept_state(group)));
  }
  void restore_state(Size mini_batch) {
    const float* state = kept_state(mini_batch / s.group);
    std::copy_n(state, J * E, W.begin());
    std::copy_n(state + J * E, M * E, V.begin());
  }

  // y^T of r rows, zero where tokens are missing.
  void flip(const Buffer& y, Size n, Buffer& y_T) const {
    if (r < K) std::fill(y_T.begin(), y_T.end(), 0.0f);
    transpose(r, n, y.data(), n, y_T.data(), P);
  }
  void add_transposed(const float* from, Buffer& to) {
    for (Size t = 0; t < r; ++t)
      for (Size f = 0; f < F; ++f) to[t * E + f] += from[f * 2 * P + t];
  }

  // Views: rows of features, pairs or single hidden layers, and hidden layers of keys and queries.
  Matrix rows(const Buffer& b) const { return {b.data(), E}; }
  Matrix pairs(const Buffer& b) const { return {b.data(), P}; }
  Matrix keys(const float* b) const { return {b, 2 * P}; }
  Matrix queries(const float* b) const { return {b + P, 2 * P}; }

  const Arguments& s;
  const Size F, M, K, P, E, I, J;
  Size a, first, r;
  Buffer gamma, beta, tau, lam, rate, x, q, offset, step, stepT, xq, S, eta, P1, S2, P2;
  Buffer Z, Zbar, hat, u, G, GT, rstd, hidden, Z1, D, G1, W, V, c;
  float* X;
  Buffer dq, dx, dZbar, dZ, dG, Y, hat_bar, dZT, dZbarT, dS, dST, dP, dS1, d_eta, P1T;
  Buffer D2, dG1, dH, dX, dW, dV, dc, rstd_bar, dgamma, dbeta, dtau, drate;
};

extern "C" {
Size kept_size(const Arguments* s) { return Head(*s, false).kept_size(); }
Size state_size(const Arguments* s) { return Head(*s, false).state_size(); }
void forward(const Arguments* s, Size a) { Head(*s, false).forward(a); }
void backward(const Arguments* s, Size a) { Head(*s, true).backward(a); }
}
