// A head's backward, from the last mini-batch to the first. It finds Z, Zbar and the hidden layers
// before their GELU kept, and the state after each group; between, it takes the state's steps back.
// Where the state grew in a group so much that this would lose it, it takes them forwards again from
// the state before the group, and holds all states between.
// dW, dV and dc are gradients of the state after the mini-batch at hand, then of the one before it.

#pragma once

#include "forward.h"

// How much larger weights may be after a group whose steps are taken back; see ../workspace.py.
constexpr float GROWTH = 32;

class Backward : Forward {
 public:
  explicit Backward(const Arguments& arguments)
      : Forward(arguments), dx(K * E), dq(K * E), dZ(K * E), dZbar(K * E), dG(K * E), Y(K * E),
        hat_bar(K * E), drate(K), dZT(E * P), dZbarT(E * P), stepT(E * P), dP(K * P), dS(K * P),
        dS1(K * P), d_eta(K * P), dST(P * P), P1T(P * P), dX(2 * I * P), D2(M * P), dG1(M * P),
        dH(M * P), dW(J * E), dV(M * E), dc(M), dgamma(F), dbeta(F), dtau(K) {}

  // Head a of A through its sequence.
  void backward(Size a) {
    start(a);
    load_state(s.dW1_final, s.db1_final, s.dW2_final, s.db2_final, dV, dc, dW);
    for (Buffer* sums : {&dgamma, &dbeta, &dtau}) std::fill(sums->begin(), sums->end(), 0.0f);
    for (Size i = all - 1; i >= 0; --i) {
      if (ends_group(i)) start_group(i);
      recall(i);
      if (forwards) {
        W = states[i % group].W;
        V = states[i % group].V;
      }
      mini_batch();
    }
    store_state(dV, dc, dW, s.dW1, s.db1, s.dW2, s.db2);
    std::copy_n(dgamma.begin(), F, s.dgamma + a * F);
    std::copy_n(dbeta.begin(), F, s.dbeta + a * F);
    std::copy_n(dtau.begin(), K, s.dtau + a * K);
  }

 private:
  struct State {
    Buffer W, V;
  };

  // The tokens of a mini-batch and what was kept of it.
  void recall(Size i) {
    load(i);
    const float* kept = kept_of(i);
    for (Buffer* b : {&Z, &Zbar, &Z1}) {
      std::copy_n(kept, b->size(), b->begin());
      kept += b->size();
    }
  }

  // The state of the group that ends with mini-batch i: after it or, in `states`, at all its steps.
  // c, of which nothing is asked here, is not kept.
  void start_group(Size i) {
    Size of_group = i / group * group;
    if (of_group == 0)
      load_state(s.W1, s.b1, s.W2, s.b2, V, c, W);
    else
      load_kept_state(of_group - 1);
    const float *W_after = group_of(i), *V_after = W_after + W.size();
    forwards = squares(J * E, W_after) > GROWTH * GROWTH * squares(I * E, W.data()) ||
               squares(M * E, V_after) > GROWTH * GROWTH * squares(M * E, V.data());
    if (!forwards) return load_kept_state(i);
    states.clear();
    for (Size n = of_group;; ++n) {
      states.push_back({W, V});
      if (n == i) return;
      recall(n);
      hidden_layers();
      inner_gradients();
      take_step();
    }
  }

  void load_kept_state(Size i) {
    const float* state = group_of(i);
    std::copy_n(state, W.size(), W.begin());
    std::copy_n(state + W.size(), V.size(), V.begin());
  }

  static float squares(Size n, const float* x) { return dot(x, x, n); }

  // Not inlined: TTT-Linear's would take 5% longer (GCC 12).
  [[gnu::noinline]] void mini_batch() {
    stepped = r == K;
    for (Buffer* sums : {&dx, &drate}) std::fill(sums->begin(), sums->end(), 0.0f);
    for (Size t = 0; t < r; ++t) {
      inner_gradient(t);
      output_backward(t);
    }
    flip(dZbar, E, dZbarT);
    hidden_layers();
    rates_of_output_layer();
    output_layer_backward();
    if (M) inner_step_backward();
    for (Size t = 0; t < r; ++t) inner_gradient_backward(t);

    // Z = X W.
    flip(dZ, E, dZT);
    add(I, P, F, keys(dX), rows(W), pairs(dZT));
    add(J, E, r, rows(dW), keys(X), rows(dZ));
    add(J, E, r, rows(dW), queries(X), rows(dZbar));
    if (M)
      first_layer_backward();
    else
      tokens_were_hidden();
    write_gradients();
  }

  // Through out = q + gamma LN(Zbar) + beta.
  void output_backward(Size t) {
    const float* d_out = token(s.d_output, t);
    float *h = &hat_bar[t * E], *d_hat = &Y[t * E];
    float inverse = normalise(&Zbar[t * E], h);
    for (Size f = 0; f < F; ++f) {
      dq[t * E + f] = d_out[f];
      dgamma[f] += d_out[f] * h[f];
      dbeta[f] += d_out[f];
      d_hat[f] = gamma[f] * d_out[f];
    }
    project(d_hat, h, inverse, &dZbar[t * E]);
  }

  // X and Xbar again, the slopes D there, and D2 of the keys' slope.
  void hidden_layers() {
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; i += WIDTH) {
        Size key = j * 2 * P + i, query = key + P;
        Gelu of_key = gelu(at(&Z1[key])), of_query = gelu(at(&Z1[query]));
        at(&X[key]) = of_key.value, at(&X[query]) = of_query.value;
        at(&D[key]) = of_key.first, at(&D[query]) = of_query.first;
        at(&D2[j * P + i]) = of_key.second;
      }
  }

  // Through Zbar = Xbar W - P2 G and the step W + X step, step = rate G, which W takes back unless
  // it is there already.
  void output_layer_backward() {
    set(r, E, r, rows(dG), pairs(P2), rows(dZbar), -1);
    set(r, P, F, pairs(dP), rows(G), pairs(dZbarT), -1);
    rates_backward(S2, dS, false);
    flip(dS, P, dST);
    set(I, P, r, keys(dX), queries(X), pairs(dST));
    set(I, P, r, queries(dX), keys(X), pairs(dS));
    if (stepped) {
      scale_rows(G);
      flip(step, E, stepT);
      add(I, P, F, keys(dX), rows(dW), pairs(stepT));
      set(K, E, J, rows(Y), keys(X).T(), rows(dW));
      step_backward(G, dG);
      if (!forwards) add(J, E, K, rows(W), keys(X), rows(step), -1);
    }
    add(I, P, F, queries(dX), rows(W), pairs(dZbarT));
  }

  // Through Z1bar = q V + c - P1 G1, the steps V + G1 step, step = rate x, and c + G1 rate, and
  // G1 = H D with H = G W^T. Of dZ1 there is D2 now, what comes by D.
  void inner_step_backward() {
    flip(G, E, GT);
    set(M, P, F, pairs(dH), rows(W), pairs(GT));  // H until dG1 is there
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) {
        Size ji = j * P + i, key = j * 2 * P + i;
        G1[ji] = dH[ji] * D[key];
        D2[ji] *= dH[ji];
        dX[key + P] *= D[key + P];  // dZ1bar
      }
    set(r, P, M, pairs(dP), pairs(G1).T(), queries(dX), -1);
    rates_backward(S, dS1, true);
    flip(P1, P, P1T);
    set(M, P, r, pairs(dG1), queries(dX), pairs(P1T), -1);
    if (stepped) {
      scale_rows(x);
      flip(step, E, stepT);
      add(M, P, F, pairs(dG1), rows(dV), pairs(stepT));
      set(K, E, M, rows(Y), pairs(G1).T(), rows(dV));
      step_backward(x, dx);
      for (Size j = 0; j < M; ++j) {
        axpy(P, dc[j], rate.data(), &dG1[j * P]);
        axpy(K, dc[j], &G1[j * P], drate.data());
      }
    }
    for (Size j = 0; j < M; ++j)
      for (Size i = 0; i < P; ++i) {
        Size ji = j * P + i;
        dH[ji] = dG1[ji] * D[j * 2 * P + i];
        D2[ji] *= dG1[ji];
      }
    add(r, E, M, rows(dG), pairs(dH).T(), rows(W));
    add(M, E, r, rows(dW), pairs(dH), rows(G));
  }

  // From dP to dS, of P = eta S, and to eta's gradient.
  void rates_backward(const Buffer& of, Buffer& d_of, bool more) {
    for (Size t = 0; t < r; ++t)
      for (Size i = 0; i < P; ++i) {
        Size ti = t * P + i;
        float d = t <= i && i < r ? dP[ti] * of[ti] : 0;
        d_eta[ti] = more ? d_eta[ti] + d : d;
        d_of[ti] = eta[ti] * dP[ti];
      }
  }

  // Through step = rate y, of which Y is the gradient.
  void step_backward(const Buffer& y, Buffer& dy) {
    for (Size t = 0; t < K; ++t) {
      drate[t] += dot(&Y[t * E], &y[t * E], E);
      axpy(E, rate[t], &Y[t * E], &dy[t * E]);
    }
  }

  // Through G = (u - <u> - hat <u hat>) / s and u, where hat and s are functions of Z.
  void inner_gradient_backward(Size t) {
    const float *d = &dG[t * E], *h = &hat[t * E], *y = &u[t * E];
    float *du = &Y[t * E], *d_hat = &dZ[t * E], *d_value = token(s.dv, t);
    float u_along = dot(y, h, E) / F, d_along = dot(d, h, E) / F;
    float d_scale = dot(d, &G[t * E], E) / F;
    project(d, h, rstd[t], du);
    for (Size f = 0; f < F; ++f) {
      float d_offset = gamma[f] * du[f];
      dgamma[f] += du[f] * (2 * gamma[f] * h[f] + offset[t * E + f]);
      dbeta[f] += d_offset;
      dx[t * E + f] += d_offset;
      d_value[f] = -d_offset;
      d_hat[f] = gamma[f] * d_offset - rstd[t] * (d[f] * u_along + y[f] * d_along);
    }
    project(d_hat, h, rstd[t], d_hat);
    axpy(F, -rstd[t] * d_scale, h, d_hat);
  }

  // Through Z1 = x V + c and Z1bar, whose V is the one before the step, and S = x q^T + 1.
  void first_layer_backward() {
    for (Size j = 0; j < M; ++j) {
      float* d = &dX[j * 2 * P];
      for (Size i = 0; i < P; ++i) d[i] = d[i] * D[j * 2 * P + i] + D2[j * P + i];
      dc[j] += sum(d, 2 * P);
    }
    add(M, E, r, rows(dV), keys(dX), rows(x));
    add(M, E, r, rows(dV), queries(dX), rows(q));
    if (stepped && !forwards) add(M, E, K, rows(V), pairs(G1), rows(step), -1);
    add(r, E, M, rows(dx), keys(dX).T(), rows(V));
    add(r, E, M, rows(dq), queries(dX).T(), rows(V));
    add(r, E, r, rows(dx), pairs(dS1), rows(q));
    add(r, E, r, rows(dq), pairs(dS1).T(), rows(x));
  }

  void tokens_were_hidden() {
    for (Size t = 0; t < r; ++t)
      for (Size f = 0; f < F; ++f) {
        dx[t * E + f] += dX[f * 2 * P + t];
        dq[t * E + f] += dX[f * 2 * P + P + t];
      }
  }

  // With lam's and tau's from eta = lam tau and rate = -lam tau_K.
  void write_gradients() {
    for (Size t = 0; t < r; ++t) {
      std::copy_n(&dq[t * E], F, token(s.dq, t));
      std::copy_n(&dx[t * E], F, token(s.dk, t));
      *token(s.dlam, t) = dot(&d_eta[t * P], tau.data(), P) - tau[K - 1] * drate[t];
      axpy(r, lam[t], &d_eta[t * P], dtau.data());
      dtau[K - 1] -= lam[t] * drate[t];
    }
  }

  bool stepped = false, forwards = false;
  std::vector<State> states;  // before each mini-batch of a group whose steps are taken forwards
  Buffer dx, dq, dZ, dZbar, dG, Y, hat_bar, drate, dZT, dZbarT, stepT, dP, dS, dS1, d_eta, dST, P1T;
  Buffer dX, D2, dG1, dH, dW, dV, dc, dgamma, dbeta, dtau;
};
