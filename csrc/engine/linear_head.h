// K steps of gradient descent on a linear head, from the labelled support rows of one task, and their
// adjoint.
//
// The head starts as W [N][D], b [N], shared by all tasks. A step moves it by -rate G^T (X, 1), with X the
// support rows and G = oracle(Z, labels), so the head stays W - P^T X, b - sum P, and the logits of the
// support rows
//
//   Z_k = Z_0 - A P_k,   A = X X^T + 1,   P_{k+1} = P_k + rate_k G(Z_k)
//
// whatever D is. The head itself is formed once, at the end, and applied to the query rows.
#pragma once

#include "engine/feature_rows.h"
#include "engine/oracles.h"

namespace kernelmeta {

// What the forward pass leaves for the backward pass, one task; its size stands in
// kernelmeta/ops/linear_head_op.py.
template <class C>
struct HeadTrace {
  C* gram;   // [S][ld]
  C* z;      // [K][N][ld]    logits before every step
  C* p;      // [K+1][N][ld]  P before every step, and after the last
  C* theta;  // [N][D]        the head after the last step, without its bias

  KERNELMETA_INLINE HeadTrace(Arena<C>& arena, const Sizes& s)
      : gram(arena.take(s.S * padded(s.S))),
        z(arena.take(s.K * s.N * padded(s.S))),
        p(arena.take((s.K + 1) * s.N * padded(s.S))),
        theta(arena.take(s.N * s.D)) {}
};

template <class B>
struct LinearHead {
  using C = typename B::Scalar;

  B& block;
  const Sizes& s;
  Oracle oracle;
  bool first_order;
  const C *weight, *bias;  // [N][D], [N]
  const C* rates;          // [K]
  FeatureRows<typename B::Feature> support, query;
  const int64_t* labels;  // [S]
  C* y;                   // [N][ld], scratch: the labels, one-hot
  HeadTrace<C> trace;

  struct Scratch {
    C* z0;  // [N][ld]
    C* g;   // [N][ld]
    C* b;   // [N]

    KERNELMETA_INLINE Scratch(Arena<C>& arena, const Sizes& s)
        : z0(arena.take(s.N * padded(s.S))), g(arena.take(s.N * padded(s.S))), b(arena.take(s.N)) {}
  };

  // -> logits [Q][N], head [N][D + 1] or null: the weights and the bias of every class.
  KERNELMETA_INLINE void forward(const Scratch& t, C* logits, C* head) {
    const int64_t N = s.N, S = s.S, K = s.K, ld = padded(S);
    one_hot();
    if (K > 0) block.self_dots(S, support, s.D, trace.gram, ld);
    if (K > 0) block.dots(N, FeatureRows<C>{weight, s.D, nullptr}, S, support, s.D, t.z0, ld);
    block.unfenced().rows(S, S, [&](int64_t i, auto row) {
      C* a = trace.gram + i * ld;
      if (K > 0) row.each([&](auto j) { j.store(a, j.load(a) + C(1)); });
    });
    block.rows(N, S, [&](int64_t n, auto row) {
      row.each([&](auto i) {
        if (K > 0) i.store(t.z0 + n * ld, i.load(t.z0 + n * ld) + bias[n]);
        i.store(trace.p + n * ld, i.zero());
      });
    });
    for (int64_t k = 0; k < K; ++k) {
      C* z = trace.z + k * N * ld;
      const C* p = trace.p + k * N * ld;
      C* next = trace.p + (k + 1) * N * ld;
      block.mm(N, S, S, {p, ld, 1}, trace.gram, ld, z, ld, nullptr);
      block.rows(N, S, [&](int64_t n, auto row) {
        row.each([&](auto i) { i.store(z + n * ld, i.load(t.z0 + n * ld) - i.load(z + n * ld)); });
      });
      ask(z, t.g);
      block.rows(N, S, [&](int64_t n, auto row) {
        row.each(
            [&](auto i) { i.store(next + n * ld, i.load(p + n * ld) + i.load(t.g + n * ld) * rates[k]); });
      });
    }
    const C* last = trace.p + K * N * ld;
    block.unfenced().rows(N, S, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto i) { return i.load(last + n * ld); });
      row.each([&](auto i) { i.store(t.g + n * ld, -i.load(last + n * ld)); });
      row.one([&] { t.b[n] = bias[n] - sum; });
    });
    block.features(N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) { d.store(trace.theta + n * s.D, d.load(weight + n * s.D)); });
    });
    block.features_mm_add(N, S, s.D, {t.g, ld, 1}, support, trace.theta);
    block.dots(s.Q, query, N, FeatureRows<C>{trace.theta, s.D, nullptr}, s.D, logits, N);
    block.unfenced().each_item(s.Q * N, [&](int64_t i) { logits[i] += t.b[i % N]; });
    if (!head) return;
    block.unfenced().features(N, s.D, [&](int64_t n, auto row) {
      C* to = head + n * (s.D + 1);
      row.each([&](auto d) { d.store(to, d.load(trace.theta + n * s.D)); });
      row.one([&] { to[s.D] = t.b[n]; });
    });
  }

  struct Adjoint {
    C *gp, *gz, *gz0, *g, *coefficients;  // [N][ld] each
    C* gram;                              // [S][ld]: gradient of A, where the rows get one
    C *gtheta, *gb, *grate;               // [N][D], [N], [N]: one sum per class, added up in order

    KERNELMETA_INLINE Adjoint(Arena<C>& arena, const Sizes& s, bool support_gradient)
        : gp(arena.take(s.N * padded(s.S))),
          gz(arena.take(s.N * padded(s.S))),
          gz0(arena.take(s.N * padded(s.S))),
          g(arena.take(s.N * padded(s.S))),
          coefficients(arena.take(s.N * padded(s.S))),
          gram(support_gradient ? arena.take(s.S * padded(s.S)) : nullptr),
          gtheta(arena.take(s.N * s.D)),
          gb(arena.take(s.N)),
          grate(arena.take(s.N)) {}
  };

  // Gradients of the logits and of the head (or null) -> those of the rows (or null); adds to those of W, b,
  // rates.
  KERNELMETA_INLINE void backward(const Adjoint& t, const C* grad_logits, const C* grad_head, C* gsupport,
                                  C* gquery, C* gweight, C* gbias, C* grates) {
    const int64_t N = s.N, S = s.S, Q = s.Q, D = s.D, K = s.K, ld = padded(S);
    one_hot();
    block.features(N, D, [&](int64_t n, auto row) {
      row.each(
          [&](auto d) { d.store(t.gtheta + n * D, grad_head ? d.load(grad_head + n * (D + 1)) : d.zero()); });
    });
    block.features_mm_add(N, Q, D, {grad_logits, 1, N}, query, t.gtheta);
    block.unfenced().each_item(N, [&](int64_t n) {
      C sum = grad_head ? grad_head[n * (D + 1) + D] : C(0);
      for (int64_t q = 0; q < Q; ++q) sum += grad_logits[q * N + n];
      t.gb[n] = sum;
    });
    if (gquery) {
      block.features_zero(Q, D, gquery);
      block.unfenced().features_mm_add(Q, N, D, {grad_logits, N, 1}, FeatureRows<C>{trace.theta, D, nullptr},
                                       gquery);
    }
    block.dots(N, FeatureRows<C>{t.gtheta, D, nullptr}, S, support, D, t.gp, ld);
    block.rows(N, S, [&](int64_t n, auto row) {
      row.each([&](auto i) {
        i.store(t.gp + n * ld, -(i.load(t.gp + n * ld) + t.gb[n]));
        i.store(t.gz0 + n * ld, i.zero());
      });
    });
    if (t.gram) block.unfenced().rows(S, S, [&](int64_t i, auto row) { zero_row(row, t.gram + i * ld); });
    for (int64_t k = K - 1; k >= 0; --k) step_backward(t, k, grates);

    if (gsupport && !first_order) {
      block.unfenced().features_zero(S, D, gsupport);
      // theta = W - P^T X, and Z_0 = X W^T + b
      const C* last = trace.p + K * N * ld;
      block.rows(N, S, [&](int64_t n, auto row) {
        row.each([&](auto i) { i.store(t.coefficients + n * ld, -i.load(last + n * ld)); });
      });
      block.unfenced().features_mm_add(S, N, D, {t.coefficients, 1, ld}, FeatureRows<C>{t.gtheta, D, nullptr},
                                       gsupport);
      block.unfenced().features_mm_add(S, N, D, {t.gz0, 1, ld}, FeatureRows<C>{weight, D, nullptr}, gsupport);
      // (parts the loads of gtheta from what is stored there next, column by column, but not by the same
      // threads)
      block.features_mm_add(S, S, D, {t.gram, ld, 1}, support, gsupport);
    } else if (gsupport) {
      block.unfenced().features_zero(S, D, gsupport);
    }
    if (!first_order) block.features_mm_add(N, S, D, {t.gz0, ld, 1}, support, t.gtheta);
    block.unfenced().features(N, D, [&](int64_t n, auto row) {
      row.each([&](auto d) { d.store(gweight + n * D, d.load(gweight + n * D) + d.load(t.gtheta + n * D)); });
    });
    block.rows(N, S, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto i) { return i.load(t.gz0 + n * ld); });
      row.one([&] { gbias[n] += t.gb[n] + sum; });
    });
  }

 private:
  KERNELMETA_INLINE void one_hot() {
    const int64_t ld = padded(s.S);
    block.unfenced().each_item(
        s.N * ld, [&](int64_t i) { y[i] = i % ld < s.S && labels[i % ld] == i / ld ? C(1) : C(0); });
  }

  template <class Row>
  KERNELMETA_INLINE static void zero_row(Row row, C* to) {
    row.each([&](auto j) { j.store(to, j.zero()); });
  }

  KERNELMETA_INLINE OracleRows<B> rows() const {
    return {block, s.N, s.S, padded(s.S), y, C(1) / C(s.S), C(s.S), C(1)};
  }

  KERNELMETA_INLINE void ask(const C* z, C* g) {
    with_oracle(oracle, [&](auto one) { one.forward(rows(), z, g); });
  }

  // gp: gradient of P_{k+1} -> gradient of P_k; adds to gz0, to the gradient of A and to that of the rate.
  KERNELMETA_INLINE void step_backward(const Adjoint& t, int64_t k, C* grates) {
    const int64_t N = s.N, S = s.S, ld = padded(S);
    const C* z = trace.z + k * N * ld;
    ask(z, t.g);
    block.row_sums(N, S, t.grate,
                   [&](int64_t n, auto i) { return i.load(t.gp + n * ld) * i.load(t.g + n * ld); });
    block.unfenced().each_item(1, [&](int64_t) {
      for (int64_t n = 0; n < N; ++n) grates[k] += t.grate[n];
    });
    if (first_order) return;  // G is a constant there
    with_oracle(oracle, [&](auto one) { one.backward(rows(), z, t.g, t.gp, t.gz); });
    const C rate = rates[k];
    block.rows(N, S, [&](int64_t n, auto row) {
      row.each([&](auto i) {
        const auto gz = i.load(t.gz + n * ld) * rate;
        i.store(t.gz0 + n * ld, i.load(t.gz0 + n * ld) + gz);
        i.store(t.coefficients + n * ld, -gz);
      });
    });
    block.unfenced().mm_add(N, S, S, {t.coefficients, ld, 1}, trace.gram, ld, t.gp, ld);
    if (!t.gram) return;
    const C* p = trace.p + k * N * ld;
    block.unfenced().mm_add(S, N, S, {t.coefficients, 1, ld}, p, ld, t.gram, ld);
    block.mm_add(S, N, S, {p, 1, ld}, t.coefficients, ld, t.gram, ld);
  }
};

}  // namespace kernelmeta
