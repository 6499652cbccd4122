// Where an inner loop meets the D-dimensional features: class means, Gram matrix, theta_K, and the way back.
// Everything else (inner_loop.h, mlp.h) lives in the space of the rows.
#pragma once

#include "engine/inner_loop.h"

namespace kernelmeta {

// Rows of one task's features, or of a bank that `index` points into.
template <class C>
struct Rows {
  const C* data;
  int64_t stride;        // in elements
  const int64_t* index;  // null: row i is row i

  __host__ __device__ __forceinline__ const C* operator()(int64_t i) const {
    return data + (index ? index[i] : i) * stride;
  }
};

// The support rows of one task, sorted by class: class n owns members[offsets[n] .. offsets[n + 1]).
struct ClassMembers {
  const int32_t* members;  // [S]
  const int32_t* offsets;  // [N + 1]

  __host__ __device__ __forceinline__ int64_t count(int64_t n) const { return offsets[n + 1] - offsets[n]; }
};

// theta0[n] = w * mean of the normalised support rows of class n (Hu et al. 2020, section 4.1).
template <class B>
struct ClassMeans {
  using C = typename B::Scalar;

  B& block;
  const Sizes& s;
  Rows<C> support;
  ClassMembers classes;
  const C* weight;  // [D] or null: ones
  C* inverse;       // [S], scratch

  __host__ __device__ __forceinline__ void forward(C* theta0) {
    inverse_norms();
    block.features(s.N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) {
        auto m = mean(n, d);
        if (weight) m = m * d.load(weight);
        d.store(theta0 + n * s.D, m);
      });
    });
  }

  // gtheta0 [N][D] -> gsupport [S][D] (or null); adds to gweight [D] (or null).
  __host__ __device__ __forceinline__ void backward(const C* gtheta0, C* gsupport, C* gweight) {
    inverse_norms();
    if (gweight) {
      block.features(1, s.D, [&](int64_t, auto row) {
        row.each([&](auto d) {
          auto sum = d.load(gweight);
          for (int64_t n = 0; n < s.N; ++n) sum = sum + d.load(gtheta0 + n * s.D) * mean(n, d);
          d.store(gweight, sum);
        });
      });
    }
    if (!gsupport) return;
    block.features(s.N, s.D, [&](int64_t n, auto row) {
      const C share = C(1) / C(classes.count(n));
      const C* g = gtheta0 + n * s.D;
      for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) {
        const int64_t i = classes.members[j];
        const C* x = support(i);
        C* gx = gsupport + i * s.D;
        C along = 0;
        if (inverse[i] < C(1 / kNormFloor)) {
          along =
              row.sum([&](auto d) { return towards(g, d) * d.load(x); }) * share * inverse[i] * inverse[i];
        }
        row.each([&](auto d) { d.store(gx, (towards(g, d) * share - d.load(x) * along) * inverse[i]); });
      }
    });
  }

 private:
  template <class At>
  __host__ __device__ __forceinline__ auto towards(const C* g, At d) const {
    return weight ? d.load(g) * d.load(weight) : d.load(g);
  }

  template <class At>
  __host__ __device__ __forceinline__ auto mean(int64_t n, At d) const {
    auto sum = d.zero();
    for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) {
      const int64_t i = classes.members[j];
      sum = sum + d.load(support(i)) * inverse[i];
    }
    return sum * (C(1) / C(classes.count(n)));
  }

  __host__ __device__ __forceinline__ void inverse_norms() {
    block.features(s.S, s.D, [&](int64_t i, auto row) {
      const C* x = support(i);
      const C squares = row.sum([&](auto d) { return d.load(x) * d.load(x); });
      row.one([&] { inverse[i] = C(1) / B::max(B::sqrt(squares), C(kNormFloor)); });
    });
  }
};

// The query rows and theta0 of one task, on their way into the trace and back out of it.
template <class B>
struct QueryFeatures {
  using C = typename B::Scalar;

  B& block;
  const Sizes& s;
  Rows<C> query;
  const Trace<C>& trace;

  __host__ __device__ __forceinline__ Rows<C> theta0() const { return {trace.theta0, s.D, nullptr}; }

  // trace.theta0 -> trace.inverse, gram, u[0] = rows times theta0, r2[0] = |theta0|^2.
  __host__ __device__ __forceinline__ void forward() {
    const int64_t Q = s.Q, ld = s.ld();
    const C floor = C(kNormFloor);
    if (s.K) block.self_dots(Q, query, s.D, trace.gram, ld);
    block.dots(s.N, theta0(), Q, query, s.D, trace.u, ld);
    block.features(s.N, s.D, [&](int64_t n, auto row) {
      const C* t = trace.theta0 + n * s.D;
      const C squares = row.sum([&](auto d) { return d.load(t) * d.load(t); });
      row.one([&] { trace.r2[n] = squares; });
    });
    if (s.K) {
      block.each_item(
          Q, [&](int64_t q) { trace.inverse[q] = C(1) / B::max(B::sqrt(trace.gram[q * ld + q]), floor); });
      block.rows(Q, Q, [&](int64_t i, auto row) {
        C* a = trace.gram + i * ld;
        const C scale = trace.inverse[i];
        row.each([&](auto q) { q.store(a, q.load(a) * q.load(trace.inverse) * scale); });
      });
    } else {
      block.features(Q, s.D, [&](int64_t i, auto row) {
        const C* x = query(i);
        const C squares = row.sum([&](auto d) { return d.load(x) * d.load(x); });
        row.one([&] { trace.inverse[i] = C(1) / B::max(B::sqrt(squares), floor); });
      });
    }
    block.rows(s.N, Q, [&](int64_t n, auto row) {
      C* u = trace.u + n * ld;
      row.each([&](auto q) { q.store(u, q.load(u) * q.load(trace.inverse)); });
    });
  }

  // theta_K = a theta0 + Xhat^T P. scratch: [N][ld].
  __host__ __device__ __forceinline__ void weights(C* out, C* scratch) {
    const C* a = trace.a + s.K * s.N;
    block.features(s.N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) { d.store(out + n * s.D, d.load(trace.theta0 + n * s.D) * a[n]); });
    });
    scaled_rows(trace.p + s.K * s.N * s.ld(), scratch);
    block.features_mm_add(s.N, s.Q, s.D, {scratch, s.ld(), 1}, query, out);
  }

  // Gradient of theta_K -> gradients of P_K (adj.gp) and a_K (adj.ga).
  __host__ __device__ __forceinline__ void weights_backward(const C* gweights,
                                                            const typename InnerLoop<B>::Adjoint& adj) {
    block.dots(s.N, Rows<C>{gweights, s.D, nullptr}, s.Q, query, s.D, adj.gp, s.ld());
    scaled_rows(adj.gp, adj.gp);
    block.features(s.N, s.D, [&](int64_t n, auto row) {
      const C sum =
          row.sum([&](auto d) { return d.load(gweights + n * s.D) * d.load(trace.theta0 + n * s.D); });
      row.one([&] { adj.ga[n] = sum; });
    });
  }

  // Scratch of `backward`.
  struct Scratch {
    C *gc, *gci;  // [N][ld]: gradient of C; the same times 1 / |x|
    C* gn0;       // [N]: gradient of |theta0|^2
    C* w;         // [Q][ld]: gradient of the Gram matrix, symmetrised; only for the features' gradient
    C* along;     // [Q]
    C *xg, *p;    // [N][ld]: Xhat gtheta_K and P_K / |x|; only with weights and the features' gradient

    __host__ __device__ __forceinline__ Scratch(Arena<C>& arena, const Sizes& s, bool query_grad,
                                                bool weights)
        : gc(arena.take(s.N * s.ld())),
          gci(arena.take(s.N * s.ld())),
          gn0(arena.take(s.N)),
          w(query_grad ? arena.take(s.Q * s.ld()) : nullptr),
          along(query_grad ? arena.take(s.Q) : nullptr),
          xg(query_grad && weights ? arena.take(s.N * s.ld()) : nullptr),
          p(query_grad && weights ? arena.take(s.N * s.ld()) : nullptr) {}
  };

  // adj.gu, adj.gr2 of the start -> gtheta0 [N][D]. gweights [N][D] or null.
  __host__ __device__ __forceinline__ void theta0_backward(const typename InnerLoop<B>::Adjoint& adj,
                                                           const C* gweights, const Scratch& t, C* gtheta0) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.rows(N, Q, [&](int64_t n, auto row) {
      const C r2 = trace.r2[n];
      const C inverse = C(1) / B::sqrt(r2);
      const C* gu = adj.gu + n * ld;
      const C along = row.sum([&](auto q) { return q.load(gu) * q.load(trace.u + n * ld); });
      const bool floored = !(r2 > C(kNormFloor) * C(kNormFloor));
      row.each([&](auto q) { q.store(t.gc + n * ld, q.load(gu) * inverse); });
      row.one([&] { t.gn0[n] = floored ? C(0) : adj.gr2[n] - along / (2 * r2); });
    });
    scaled_rows(t.gc, t.gci);
    const C* a = trace.a ? trace.a + s.K * N : nullptr;
    block.features(N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) {
        auto g = d.load(trace.theta0 + n * s.D) * (2 * t.gn0[n]);
        if (gweights) g = g + d.load(gweights + n * s.D) * a[n];
        d.store(gtheta0 + n * s.D, g);
      });
    });
    block.features_mm_add(N, Q, s.D, {t.gci, ld, 1}, query, gtheta0);
  }

  // After theta0_backward: -> gquery [Q][D]. t.xg must hold Xhat gtheta_K where there are weights.
  __host__ __device__ __forceinline__ void query_backward(const typename InnerLoop<B>::Adjoint& adj,
                                                          const C* gweights, const Scratch& t, C* gquery) {
    const int64_t N = s.N, Q = s.Q, D = s.D, ld = s.ld(), KN = s.K * s.N;
    const C* p = trace.p ? trace.p + KN * ld : nullptr;
    if (s.K) {
      block.mm(Q, KN, Q, {adj.gs, 1, ld}, adj.gag, ld, t.w, ld, nullptr);
      block.mm_add(Q, KN, Q, {adj.gag, 1, ld}, adj.gs, ld, t.w, ld);
    }
    // The gradient of a normalised row has no component along the row: remove it on the diagonal.
    block.rows(Q, Q, [&](int64_t i, auto row) {
      C along = 0;
      if (s.K) {
        const C* w = t.w + i * ld;
        along = row.sum([&](auto q) { return q.load(w) * q.load(trace.gram + i * ld); });
      }
      row.one([&] {
        for (int64_t n = 0; n < N; ++n) {
          along += t.gc[n * ld + i] * trace.u[n * ld + i] * B::sqrt(trace.r2[n]);
          if (gweights) along += p[n * ld + i] * t.xg[n * ld + i];
        }
        const bool floored = !(trace.inverse[i] < C(1 / kNormFloor));
        t.along[i] = floored ? C(0) : along * trace.inverse[i] * trace.inverse[i];
      });
    });
    if (s.K) {
      block.rows(Q, Q, [&](int64_t i, auto row) {
        C* w = t.w + i * ld;
        const C scale = trace.inverse[i];
        row.each([&](auto q) { q.store(w, q.load(w) * q.load(trace.inverse) * scale); });
        row.one([&] { w[i] -= t.along[i]; });
      });
      block.features_zero(Q, D, gquery);
      block.features_mm_add(Q, Q, D, {t.w, ld, 1}, query, gquery);
    } else {
      block.features(Q, D, [&](int64_t i, auto row) {
        row.each([&](auto d) { d.store(gquery + i * D, d.load(query(i)) * -t.along[i]); });
      });
    }
    block.features_mm_add(Q, N, D, {t.gci, 1, ld}, theta0(), gquery);
    if (gweights) {
      scaled_rows(p, t.p);
      block.features_mm_add(Q, N, D, {t.p, 1, ld}, Rows<C>{gweights, D, nullptr}, gquery);
    }
  }

 private:
  // to[n][q] = from[n][q] / |x_q|; may be in place.
  __host__ __device__ __forceinline__ void scaled_rows(const C* from, C* to) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(to + n * ld, q.load(from + n * ld) * q.load(trace.inverse)); });
    });
  }
};

}  // namespace kernelmeta
