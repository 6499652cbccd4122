// Where an inner loop meets the D-dimensional features: class means, Gram matrix, theta_K, and the way back.
// Everything else (inner_loop.h, mlp.h) lives in the space of the rows.
#pragma once

#include "engine/inner_loop.h"

namespace kernelmeta {

// The support rows of one task, sorted by class: class n owns members[offsets[n] .. offsets[n + 1]).
struct ClassMembers {
  const int32_t* members;  // [S]
  const int32_t* offsets;  // [N + 1]

  KERNELMETA_INLINE int64_t count(int64_t n) const { return offsets[n + 1] - offsets[n]; }
};

// theta0[n] = w * mean of the normalised support rows of class n (Hu et al. 2020, section 4.1).
template <class B>
struct ClassMeans {
  using C = typename B::Scalar;
  using F = typename B::Feature;

  B& block;
  const typename B::Sizes& s;
  FeatureRows<F> support;
  ClassMembers classes;
  const C* weight;  // [D] or null: ones
  C* inverse;       // [S], scratch

  KERNELMETA_INLINE void forward(C* theta0) {
    inverse_norms();
    block.feature_entries(s.N, s.D, [&](int64_t n, auto d) {
      auto m = mean(n, d);
      if (weight) m = m * d.load(weight);
      d.store(theta0 + n * s.D, m);
    });
  }

  // gtheta0 [N][D] -> gsupport [S][D] (or null; with `adds` added to it); adds to gweight [D] (or null).
  KERNELMETA_INLINE void backward(const C* gtheta0, C* gsupport, C* gweight, bool adds = false) {
    inverse_norms();
    if (gweight) {
      block.feature_columns(s.D, [&](auto d) {
        auto sum = d.load(gweight);
        for (int64_t n = 0; n < s.N; ++n) sum = sum + d.load(gtheta0 + n * s.D) * mean(n, d);
        d.store(gweight, sum);
      });
    }
    if (!gsupport) return;
    block.unfenced().features(s.N, s.D, [&](int64_t n, auto row) {
      const C share = C(1) / C(classes.count(n));
      const C* g = gtheta0 + n * s.D;
      for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) {
        const int64_t i = classes.members[j];
        const F* x = support(i);
        C* gx = gsupport + i * s.D;
        const C of_row = inverse[i];
        const auto unit = [&](auto d) { return unit_at<B>(d, x, of_row, s.D == 1); };
        C along = 0;
        if (!at_floor(of_row)) along = row.sum([&](auto d) { return towards(g, d) * unit(d); });
        row.each([&](auto d) {
          const auto value = (towards(g, d) - unit(d) * along) * (share * of_row);
          d.store(gx, adds ? d.load(gx) + value : value);
        });
      }
    });
  }

 private:
  template <class At>
  KERNELMETA_INLINE auto towards(const C* g, At d) const {
    return weight ? d.load(g) * d.load(weight) : d.load(g);
  }

  template <class At>
  KERNELMETA_INLINE auto mean(int64_t n, At d) const {
    auto sum = d.zero();
    for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) {
      const int64_t i = classes.members[j];
      sum = sum + unit_at<B>(d, support(i), inverse[i], s.D == 1);
    }
    return sum * (C(1) / C(classes.count(n)));
  }

  KERNELMETA_INLINE void inverse_norms() {
    block.features(s.S, s.D, [&](int64_t i, auto row) {
      const C found = inverse_norm<B>(row, support(i));
      row.one([&] { inverse[i] = found; });
    });
  }
};

// The query rows and theta0 of one task, on their way into the trace and back out of it.
template <class B>
struct QueryFeatures {
  using C = typename B::Scalar;
  using F = typename B::Feature;

  B& block;
  const typename B::Sizes& s;
  FeatureRows<F> query;
  const Trace<C>& trace;

  // trace.theta -> trace.inverse, gram, u[0] = rows times theta, r2[0] = |theta|^2. False where the norm of
  // some row says that their products are out of range.
  KERNELMETA_INLINE bool forward() {
    const int64_t Q = s.Q, ld = s.ld();
    block.stacked_dots(Q, query, s.N, trace.theta, s.D, trace.gram, trace.u, ld, trace.r2);
    const bool extreme = block.any(Q, [&](int64_t q) { return out_of_range(trace.gram[q * ld + q]); });
    block.each_item(Q, [&](int64_t q) {
      trace.inverse[q] = C(1) / B::max(B::sqrt(trace.gram[q * ld + q]), C(kNormFloor));
    });
    block.unfenced().rows(Q, Q, [&](int64_t i, auto row) {
      C* a = trace.gram + i * ld;
      const C scale = trace.inverse[i];
      row.each([&](auto q) { q.store(a, q.load(a) * q.load(trace.inverse) * scale); });
    });
    block.unfenced().rows(s.N, Q, [&](int64_t n, auto row) {
      C* u = trace.u + n * ld;
      row.each([&](auto q) { q.store(u, q.load(u) * q.load(trace.inverse)); });
    });
    return !extreme;
  }

  // trace.inverse alone. No barrier: each is known to the warp that takes its row.
  KERNELMETA_INLINE void norms() {
    block.unfenced().features(s.Q, s.D, [&](int64_t i, auto row) {
      const C found = inverse_norm<B>(row, query(i));
      row.one([&] { trace.inverse[i] = found; });
    });
  }

  // theta_K = a theta + Xhat^T P, or as it is there. scratch: [N][ld].
  KERNELMETA_INLINE void weights(C* out, C* scratch) {
    const C* theta = trace.gram ? trace.theta : trace.theta + s.K * s.N * s.D;
    const C* a = trace.gram ? trace.a + s.K * s.N : nullptr;
    block.unfenced().feature_entries(s.N, s.D, [&](int64_t n, auto d) {
      d.store(out + n * s.D, d.load(theta + n * s.D) * (a ? a[n] : C(1)));
    });
    if (!trace.gram) return;
    scaled_rows(trace.p + s.K * s.N * s.ld(), scratch);
    block.unfenced().features_mm_add(s.N, s.Q, s.D, {scratch, s.ld(), 1}, query, out);
  }

  // Gradient of theta_K -> gradients of P_K (adj.gp) and a_K (adj.ga).
  KERNELMETA_INLINE void weights_backward(const C* gweights, const LoopAdjoint<B>& adj) {
    block.dots(s.N, FeatureRows<C>{gweights, s.D, nullptr}, s.Q, query, s.D, adj.gp, s.ld());
    scaled_rows(adj.gp, adj.gp);
    block.unfenced().features(s.N, s.D, [&](int64_t n, auto row) {
      const C sum =
          row.sum([&](auto d) { return d.load(gweights + n * s.D) * d.load(trace.theta + n * s.D); });
      row.one([&] { adj.ga[n] = sum; });
    });
  }

  // Scratch of the backward pass.
  struct Scratch {
    C *gc, *scaled;  // [N][ld]: gradient of C; rows divided by |x|
    C* gn0;          // [N]: gradient of |theta0|^2
    C* w;            // [Q][ld]: gradient of A, symmetrised; where A was formed and the rows get a gradient

    KERNELMETA_INLINE Scratch(Arena<C>& arena, const typename B::Sizes& s, bool gram_gradient)
        : gc(arena.take(s.N * s.ld())),
          scaled(arena.take(s.N * s.ld())),
          gn0(arena.take(s.N)),
          w(gram_gradient ? arena.take(s.Q * s.ld()) : nullptr) {}
  };

  // adj.gu, adj.gr2 of the start -> gtheta0 [N][D]. gweights [N][D] or null.
  KERNELMETA_INLINE void theta0_backward(const LoopAdjoint<B>& adj, const C* gweights, const Scratch& t,
                                         C* gtheta0) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      const C r2 = trace.r2[n];
      const C inverse = C(1) / B::sqrt(r2);
      const C* gu = adj.gu + n * ld;
      const C along = row.sum([&](auto q) { return q.load(gu) * q.load(trace.u + n * ld); });
      const bool floored = theta_at_floor(r2);
      row.each([&](auto q) { q.store(t.gc + n * ld, q.load(gu) * inverse); });
      row.one([&] { t.gn0[n] = floored ? C(0) : adj.gr2[n] - along / (2 * r2); });
    });
    scaled_rows(t.gc, t.scaled);
    const C* a = trace.a ? trace.a + s.K * N : nullptr;
    block.feature_entries(N, s.D, [&](int64_t n, auto d) {
      auto g = d.load(trace.theta + n * s.D) * (2 * t.gn0[n]);
      if (gweights) g = g + d.load(gweights + n * s.D) * a[n];
      d.store(gtheta0 + n * s.D, g);
    });
    block.unfenced().features_mm_add(N, Q, s.D, {t.scaled, ld, 1}, query, gtheta0);
  }

  // After theta0_backward: -> gquery [Q][D].
  KERNELMETA_INLINE void query_backward(const LoopAdjoint<B>& adj, const C* gweights, const Scratch& t,
                                        C* gquery) {
    const int64_t Q = s.Q, D = s.D, ld = s.ld(), KN = s.K * s.N;
    block.unfenced().features_zero(Q, D, gquery);
    // First the gradient of the normalised rows, divided by |x|; from A, whose gradient is the sum over the
    // steps of gAG G^T and its transpose:
    block.unfenced().mm(Q, KN, Q, {adj.gs, 1, ld}, adj.gag, ld, t.w, ld, nullptr);
    block.mm_add(Q, KN, Q, {adj.gag, 1, ld}, adj.gs, ld, t.w, ld);
    block.rows(Q, Q, [&](int64_t i, auto row) {
      C* w = t.w + i * ld;
      const C scale = trace.inverse[i];
      row.each([&](auto q) { q.store(w, q.load(w) * q.load(trace.inverse) * scale); });
    });
    block.unfenced().features_mm_add(Q, Q, D, {t.w, ld, 1}, query, gquery);
    add_outer(t.gc, trace.theta, t, gquery);
    if (gweights) add_outer(trace.p + KN * ld, gweights, t, gquery);
    without_radial_part(gquery);
  }

  // gquery [Q][D], the gradient of the normalised rows over |x| -> of the rows: without its component along
  // each.
  KERNELMETA_INLINE void without_radial_part(C* gquery) const {
    block.unfenced().features(s.Q, s.D, [&](int64_t i, auto row) {
      const F* x = query(i);
      C* g = gquery + i * s.D;
      const C inverse = trace.inverse[i];
      if (at_floor(inverse)) return;
      const C along = row.sum([&](auto d) { return d.load(x) * d.load(g); }) * inverse * inverse;
      row.each([&](auto d) { d.store(g, d.load(g) - d.load(x) * along); });
    });
  }

 private:
  // gquery[q] += sum_n g[n][q] / |x_q| * theta[n]
  KERNELMETA_INLINE void add_outer(const C* g, const C* theta, const Scratch& t, C* gquery) {
    scaled_rows(g, t.scaled);
    block.features_mm_add(s.Q, s.N, s.D, {t.scaled, 1, s.ld()}, FeatureRows<C>{theta, s.D, nullptr}, gquery);
  }

  // to[n][q] = from[n][q] / |x_q|; may be in place.
  KERNELMETA_INLINE void scaled_rows(const C* from, C* to) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(to + n * ld, q.load(from + n * ld) * q.load(trace.inverse)); });
    });
  }
};

}  // namespace kernelmeta
