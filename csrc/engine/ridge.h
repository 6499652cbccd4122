// Ridge regression of one-hot labels on the support rows of one task (R2-D2, Bertinetto et al. 2019), in the
// space of the rows, and its adjoint:
//
//   (X X^T + lambda) alpha = Y,   W = X^T alpha,   Z = scale W^T x + bias
//
// One factorisation, U^T d U with ones on U's diagonal, serves the solution and the adjoint's.
#pragma once

#include "engine/feature_rows.h"

namespace kernelmeta {

// What the forward pass leaves for the backward pass, one task; its size stands in
// kernelmeta/ops/ridge_op.py. It starts as zeros.
template <class C>
struct RidgeTrace {
  C* u;      // [S][padded(S)]  above the diagonal; zeros elsewhere
  C* d;      // [S]
  C* alpha;  // [N][padded(S)]
  C* cross;  // [S][padded(Q)]  support rows times query rows
  C* fit;    // [N][padded(Q)]  Z before scale and bias

  RidgeTrace() = default;
  KERNELMETA_INLINE RidgeTrace(Arena<C>& arena, const Sizes& s)
      : u(arena.take(s.S * padded(s.S))),
        d(arena.take(s.S)),
        alpha(arena.take(s.N * padded(s.S))),
        cross(arena.take(s.S * s.ld())),
        fit(arena.take(s.N * s.ld())) {}
};

template <class B>
struct Ridge {
  using C = typename B::Scalar;

  B& block;
  const Sizes& s;
  FeatureRows<typename B::Feature> support, query;
  const RidgeTrace<C>& trace;
  C lambda, scale, bias;

  // From trace.alpha = Y (one-hot labels) on. False, in *regular, where the matrix is singular.
  KERNELMETA_INLINE void forward(bool* regular) {
    const int64_t S = s.S, ld = padded(S);
    block.self_dots(S, support, s.D, trace.u, ld);
    block.dots(S, support, s.Q, query, s.D, trace.cross, s.ld());
    block.each_item(S, [&](int64_t i) { trace.u[i * ld + i] += lambda; });
    factorise(regular);
    solve(trace.alpha);
    block.mm(s.N, S, s.Q, {trace.alpha, ld, 1}, trace.cross, s.ld(), trace.fit, s.ld(), nullptr);
  }

  // [Q][ways], minus infinity beyond the task's own N.
  KERNELMETA_INLINE void logits(int64_t ways, C* out) const {
    block.unfenced().each_item(s.Q * ways, [&](int64_t i) {
      const int64_t n = i % ways;
      out[i] = n < s.N ? scale * trace.fit[n * s.ld() + i / ways] + bias : -C(__builtin_inff());
    });
  }

  struct Scratch {
    C* gfit;                      // [N][padded(Q)]
    C* v;                         // [N][padded(S)]  gradient of alpha, then the adjoint solution
    C *negative_v, *along;        // [N][padded(S)], [N]
    C *weights, *gweights;        // [N][D]; only where rows get a gradient
    C *gscale, *gbias, *glambda;  // [N] each

    KERNELMETA_INLINE Scratch(Arena<C>& arena, const Sizes& s, bool row_gradients)
        : gfit(arena.take(s.N * s.ld())),
          v(arena.take(s.N * padded(s.S))),
          negative_v(arena.take(s.N * padded(s.S))),
          along(arena.take(s.N)),
          weights(row_gradients ? arena.take(s.N * s.D) : nullptr),
          gweights(row_gradients ? arena.take(s.N * s.D) : nullptr),
          gscale(arena.take(s.N)),
          gbias(arena.take(s.N)),
          glambda(arena.take(s.N)) {}
  };

  // grad_logits [Q][ways], grad_alpha [S][ways] or null; adds to glambda, gscale, gbias [1]; gsupport [S][D]
  // and gquery [Q][D], or null.
  KERNELMETA_INLINE void backward(const C* grad_logits, const C* grad_alpha, int64_t ways, const Scratch& t,
                                  C* glambda, C* gscale, C* gbias, C* gsupport, C* gquery) {
    const int64_t S = s.S, Q = s.Q, N = s.N, D = s.D, ld = s.ld(), lds = padded(S);
    block.rows(N, ld,
               [&](int64_t n, auto row) { row.each([&](auto q) { q.store(t.gfit + n * ld, q.zero()); }); });
    block.each_item(N * Q,
                    [&](int64_t i) { t.gfit[i / Q * ld + i % Q] = grad_logits[i % Q * ways + i / Q]; });
    block.rows(N, Q, [&](int64_t n, auto row) {
      C* g = t.gfit + n * ld;
      const C* fit = trace.fit + n * ld;
      const C along = row.sum([&](auto q) { return q.load(g) * q.load(fit); });
      const C sum = row.sum([&](auto q) { return q.load(g); });
      row.one([&] {
        t.gscale[n] = along;
        t.gbias[n] = sum;
      });
      row.each([&](auto q) { q.store(g, q.load(g) * scale); });
    });
    block.unfenced().rows(
        N, lds, [&](int64_t n, auto row) { row.each([&](auto q) { q.store(t.v + n * lds, q.zero()); }); });
    block.dots(N, FeatureRows<C>{t.gfit, ld, nullptr}, S, FeatureRows<C>{trace.cross, ld, nullptr}, Q, t.v,
               lds);
    if (grad_alpha) {
      block.each_item(N * S,
                      [&](int64_t i) { t.v[i / S * lds + i % S] += grad_alpha[i % S * ways + i / S]; });
    }
    solve(t.v);
    block.rows(N, S, [&](int64_t n, auto row) {
      const C *v = t.v + n * lds, *alpha = trace.alpha + n * lds;
      const C along = row.sum([&](auto q) { return q.load(v) * q.load(alpha); });
      row.one([&] { t.glambda[n] = -along; });
      row.each([&](auto q) { q.store(t.negative_v + n * lds, -q.load(v)); });
    });
    block.each_item(3, [&](int64_t which) {
      C* total = which == 0 ? glambda : which == 1 ? gscale : gbias;
      const C* each = which == 0 ? t.glambda : which == 1 ? t.gscale : t.gbias;
      for (int64_t n = 0; n < N; ++n) *total += each[n];
    });
    if (!gsupport && !gquery) return;
    // The gradient of X X^T is -v alpha^T, that of the cross products alpha gfit^T; N is small: through
    // [N][D].
    block.features_zero(N, D, t.weights);
    block.unfenced().features_mm_add(N, S, D, {trace.alpha, lds, 1}, support, t.weights);
    const FeatureRows<C> weights{t.weights, D, nullptr}, gweights{t.gweights, D, nullptr};
    if (gquery) {
      block.features_zero(Q, D, gquery);
      block.unfenced().features_mm_add(Q, N, D, {t.gfit, 1, ld}, weights, gquery);
    }
    if (!gsupport) return;
    block.features_zero(N, D, t.gweights);
    block.unfenced().features_mm_add(N, Q, D, {t.gfit, ld, 1}, query, t.gweights);
    block.unfenced().features_mm_add(N, S, D, {t.negative_v, lds, 1}, support, t.gweights);
    block.features_zero(S, D, gsupport);
    block.unfenced().features_mm_add(S, N, D, {trace.alpha, 1, lds}, gweights, gsupport);
    block.unfenced().features_mm_add(S, N, D, {t.negative_v, 1, lds}, weights, gsupport);
  }

 private:
  // trace.u: the matrix -> its factor; row j is done when all rows above it have been taken out of it.
  KERNELMETA_INLINE void factorise(bool* regular) {
    const int64_t S = s.S, ld = padded(S);
    C* u = trace.u;
    // Pivots that are nothing but rounding mean a singular matrix, and all that follows is NaN. NaN and
    // infinity do not mean it: they come out as NaN by themselves.
    block.each_item(1, [&](int64_t) {
      C largest = 0;
      for (int64_t i = 0; i < S; ++i) largest = B::max(largest, u[i * ld + i]);
      trace.fit[0] = largest;  // it is free until the end
      *regular = true;
    });
    const C smallest = trace.fit[0] * C(S) * (sizeof(C) == 4 ? C(1.1920929e-7) : C(2.220446049250313e-16));
    for (int64_t j = 0; j < S; ++j) {
      block.each_item(1, [&](int64_t) {
        trace.d[j] = u[j * ld + j];
        if (trace.d[j] <= smallest && smallest * 0 == 0) {
          *regular = false;
          trace.d[j] = C(__builtin_nan(""));
        }
      });
      const C inverse = C(1) / trace.d[j];
      block.rows(S - j - 1, ld, [&](int64_t r, auto row) {
        const C factor = u[j * ld + j + 1 + r] * inverse;
        C* of_row = u + (j + 1 + r) * ld;
        row.each([&](auto q) { q.store(of_row, q.load(of_row) - q.load(u + j * ld) * factor); });
      });
      block.each_item(ld,
                      [&](int64_t k) { u[j * ld + k] = k <= j || k >= S ? C(0) : u[j * ld + k] * inverse; });
    }
  }

  // x [N][padded(S)] <- the solution for these right-hand sides.
  KERNELMETA_INLINE void solve(C* x) const {
    const int64_t S = s.S, ld = padded(S);
    block.unfenced().row_steps(s.N, ld, S, [&](int64_t n, int64_t j, auto row) {
      C* xn = x + n * ld;
      const C known = row.value(xn + j);
      row.each([&](auto q) { q.store(xn, q.load(xn) - q.load(trace.u + j * ld) * known); });
    });
    block.unfenced().rows(s.N, S, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(x + n * ld, q.load(x + n * ld) / q.load(trace.d)); });
    });
    block.row_steps(s.N, ld, S - 1, [&](int64_t n, int64_t i, auto row) {
      C* xn = x + n * ld;
      const int64_t j = S - 2 - i;
      const C rest = row.sum([&](auto q) { return q.load(trace.u + j * ld) * q.load(xn); });
      row.one([&] { xn[j] -= rest; });
    });
  }
};

}  // namespace kernelmeta
