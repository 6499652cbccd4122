// Where a program meets the D-dimensional features: the Gram matrix, the start, and the way back.
#pragma once

#include "engine/features.h"
#include "engine/program.h"

namespace kernelmeta {

template <class B>
struct ProgramFeatures {
  using C = typename B::Scalar;
  using F = typename B::Feature;

  B& block;
  const ProgramShape& s;
  FeatureRows<F> support_rows, query_rows;
  const ProgramTrace<C>& trace;
  const C* theta0;      // [N][D]; null: zero
  const C* start_bias;  // [N], linear; null: zero
  bool first_order;
  bool dot;  // linear, and without a bias

  // -> trace.inverse, grams, u[0] = rows times theta0 (plus bias), r2[0] = |theta0|^2. False where the norm
  // of some row of a cosine classifier says that products of rows are out of range.
  __host__ __device__ KERNELMETA_NOINLINE bool forward() {
    const int64_t N = s.N, D = s.D, ld = s.ld();
    bool in_range = true;
    form_gram();
    each_part([&](RowRange part, FeatureRows<F> rows) {
      if (theta0)
        block.dots(N, FeatureRows<C>{theta0, D, nullptr}, part.count, rows, D, trace.u + part.first, ld);
    });
    if (s.cosine) in_range = normalise();
    if (s.has_length<B>()) {
      if (s.by_distance<B>() && !theta0) return in_range;
      block.unfenced().features(N, D, [&](int64_t n, auto row) {
        const C* t = theta0 + n * D;
        const C squares = row.sum([&](auto d) { return d.load(t) * d.load(t); });
        row.one([&] { trace.r2[n] = squares; });
      });
    } else if (start_bias) {
      each_part([&](RowRange part, FeatureRows<F>) {
        block.rows(N, ld, [&](int64_t n, auto row) {
          C* u = trace.u + n * ld + part.first;
          row.part(part.first, part.count).each([&](auto q) { q.store(u, q.load(u) + start_bias[n]); });
        });
      });
    }
    return in_range;
  }

  // trace.inverse alone.
  KERNELMETA_INLINE void norms() {
    each_part([&](RowRange part, FeatureRows<F> rows) {
      block.unfenced().features(part.count, s.D, [&](int64_t i, auto row) {
        const C found = inverse_norm<B>(row, rows(i));
        row.one([&] { trace.inverse[part.first + i] = found; });
      });
    });
  }

  // Scratch of the backward pass.
  struct Scratch {
    C *gc, *scaled;  // [N][ld]: gradient of rows times theta0; that over |x|
    C* gn0;          // [N]: gradient of |theta0|^2
    C* w;            // [widest count][ld]: gradient of a part of A; where the rows get a gradient

    KERNELMETA_INLINE Scratch(Arena<C>& arena, const ProgramShape& s, bool row_gradients)
        : gc(arena.take(s.N * s.ld())),
          scaled(arena.take(s.N * s.ld())),
          gn0(arena.take(s.N)),
          w(row_gradients ? arena.take((s.S > s.Q ? s.S : s.Q) * s.ld()) : nullptr) {}
  };

  // adj.gu, adj.gr2 of the start: added to gtheta0 [N][D] (or null) and gstart_bias [N] (or null).
  KERNELMETA_INLINE void start_backward(const typename ProgramLoop<B>::Adjoint& adj, const Scratch& t,
                                        C* gtheta0, C* gstart_bias) {
    const int64_t N = s.N, D = s.D, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C* gu = adj.gu + n * ld;
      C *gc = t.gc + n * ld, *scaled = t.scaled + n * ld;
      if (s.cosine) {
        const C r2 = trace.r2[n];
        const C inverse = C(1) / B::sqrt(r2);
        const C along = row.sum([&](auto q) { return q.load(gu) * q.load(trace.u + n * ld); });
        const bool floored = theta_at_floor(r2);
        row.each([&](auto q) {
          const auto value = q.load(gu) * inverse;
          q.store(gc, value);
          q.store(scaled, value * q.load(trace.inverse));
        });
        row.one([&] { t.gn0[n] = floored ? C(0) : adj.gr2[n] - along / (2 * r2); });
      } else {
        const C sum = row.sum([&](auto q) { return q.load(gu); });
        row.each([&](auto q) {
          q.store(gc, q.load(gu));
          q.store(scaled, q.load(gu));
        });
        row.one([&] {
          if (gstart_bias) gstart_bias[n] += sum;
          if (s.by_distance<B>()) t.gn0[n] = adj.gr2[n];
        });
      }
    });
    if (!gtheta0) return;
    if (s.has_length<B>()) {
      block.features(N, D, [&](int64_t n, auto row) {
        C* to = gtheta0 + n * D;
        row.each([&](auto d) { d.store(to, d.load(to) + d.load(theta0 + n * D) * (2 * t.gn0[n])); });
      });
    }
    each_part([&](RowRange part, FeatureRows<F> rows) {
      block.features_mm_add(N, part.count, D, {t.scaled + part.first, ld, 1}, rows, gtheta0);
    });
  }

  // After start_backward: added to gsupport [S][D] and gquery [Q][D] (or null). Where the classifier is a
  // cosine, what is there already must be orthogonal to its row.
  KERNELMETA_INLINE void rows_backward(const typename ProgramLoop<B>::Adjoint& adj, const Scratch& t,
                                       C* gsupport, C* gquery) {
    const int64_t N = s.N, D = s.D, ld = s.ld();
    // The gradient of the normalised rows, divided by |x|: from A, whose gradient is the sum over the steps
    // of G (gradient of A G)^T ...
    for (int of_query = 0; of_query < 2; ++of_query) {
      const RowRange from = s.part(of_query);
      if (!gram_gradient(adj, of_query, t.w)) continue;
      C* gfrom = of_query ? gquery : gsupport;
      each_part([&](RowRange to, FeatureRows<F> rows) {
        C* gto = to.first == s.query().first ? gquery : gsupport;
        const C* w = t.w + to.first;
        if (gfrom && !first_order) block.features_mm_add(from.count, to.count, D, {w, ld, 1}, rows, gfrom);
        if (gto) block.features_mm_add(to.count, from.count, D, {w, 1, ld}, rows_of(of_query), gto);
      });
    }
    // ... and from the rows times theta0.
    each_part([&](RowRange part, FeatureRows<F>) {
      C* to = part.first == s.query().first ? gquery : gsupport;
      if (!to || !theta0) return;
      block.features_mm_add(part.count, N, D, {t.scaled + part.first, 1, ld},
                            FeatureRows<C>{theta0, D, nullptr}, to);
    });
    if (s.cosine) without_radial_part(gsupport, gquery);
  }

  // Gradients of the normalised rows over |x| -> of the rows: without their component along each.
  KERNELMETA_INLINE void without_radial_part(C* gsupport, C* gquery) {
    const int64_t D = s.D;
    each_part([&](RowRange part, FeatureRows<F> rows) {
      C* to = part.first == s.query().first ? gquery : gsupport;
      if (!to) return;
      block.unfenced().features(part.count, D, [&](int64_t i, auto row) {
        const C inverse = trace.inverse[part.first + i];
        if (at_floor(inverse)) return;
        const F* x = rows(i);
        C* g = to + i * D;
        const C along = row.sum([&](auto d) { return d.load(x) * d.load(g); }) * inverse * inverse;
        row.each([&](auto d) { d.store(g, d.load(g) - d.load(x) * along); });
      });
    });
  }

 private:
  KERNELMETA_INLINE FeatureRows<F> rows_of(bool of_query) const {
    return of_query ? query_rows : support_rows;
  }

  // f(part, rows) for every part of the live rows.
  template <class Fn>
  KERNELMETA_INLINE void each_part(Fn f) const {
    if (s.uses_support) f(s.support(), support_rows);
    f(s.query(), query_rows);
  }

  // A's rows of the parts in use, against all live rows: of raw features, plus 1 where the classifier is
  // linear and has a bias.
  KERNELMETA_INLINE void form_gram() {
    const int64_t ld = s.ld();
    for (int of_query = 0; of_query < 2; ++of_query) {
      C* gram = trace.gram(of_query);
      if (!gram) continue;
      const RowRange part = s.part(of_query);
      block.self_dots(part.count, rows_of(of_query), s.D, gram + part.first, ld);
    }
    if (s.uses_support) {
      const RowRange query = s.query();
      block.dots(s.S, support_rows, s.Q, query_rows, s.D, trace.gram_support + query.first, ld);
      if (s.uses_query) {
        block.each_item(s.Q * s.S, [&](int64_t i) {
          trace.gram_query[i / s.S * ld + i % s.S] = trace.gram_support[i % s.S * ld + query.first + i / s.S];
        });
      }
    }
    if (s.has_length<B>() || (B::kJointSteps && dot)) return;
    for (int of_query = 0; of_query < 2; ++of_query) {
      C* gram = trace.gram(of_query);
      if (!gram) continue;
      each_part([&](RowRange to, FeatureRows<F>) {
        block.unfenced().rows(s.part(of_query).count, to.count, [&](int64_t i, auto row) {
          C* a = gram + i * ld + to.first;
          row.each([&](auto q) { q.store(a, q.load(a) + C(1)); });
        });
      });
    }
  }

  // trace.inverse; A and u[0] become those of the normalised rows. False: see forward.
  KERNELMETA_INLINE bool normalise() {
    const int64_t ld = s.ld();
    bool extreme = false;
    for (int of_query = 0; of_query < 2; ++of_query) {
      const RowRange part = s.part(of_query);
      C* inverse = trace.inverse + part.first;
      const C* gram = trace.gram(of_query);
      if (gram) {
        const auto square = [&](int64_t i) { return gram[i * ld + part.first + i]; };
        extreme |= block.any(part.count, [&](int64_t i) { return out_of_range(square(i)); });
        block.each_item(part.count,
                        [&](int64_t i) { inverse[i] = C(1) / B::max(B::sqrt(square(i)), C(kNormFloor)); });
      } else if (of_query) {
        block.features(part.count, s.D, [&](int64_t i, auto row) {
          const C found = inverse_norm<B>(row, query_rows(i));
          row.one([&] { inverse[i] = found; });
        });
        extreme |=
            block.any(part.count, [&](int64_t i) { return out_of_range(C(1) / inverse[i] / inverse[i]); });
      }
    }
    for (int of_query = 0; of_query < 2; ++of_query) {
      C* gram = trace.gram(of_query);
      if (!gram) continue;
      scale_gram(of_query, gram);
    }
    block.unfenced().rows(s.N, ld, [&](int64_t n, auto row) {
      C* u = trace.u + n * ld;
      row.each([&](auto q) { q.store(u, q.load(u) * q.load(trace.inverse)); });
    });
    return !extreme;
  }

  // a[i][j] times 1 / |x_i| and 1 / |x_j|
  KERNELMETA_INLINE void scale_gram(bool of_query, C* gram) {
    const int64_t ld = s.ld();
    const RowRange part = s.part(of_query);
    block.rows(part.count, ld, [&](int64_t i, auto row) {
      C* a = gram + i * ld;
      const C scale = trace.inverse[part.first + i];
      row.each([&](auto q) { q.store(a, q.load(a) * q.load(trace.inverse) * scale); });
    });
  }

  // w [count][ld] = the gradient of A's rows of one part; false where no phase used them.
  KERNELMETA_INLINE bool gram_gradient(const typename ProgramLoop<B>::Adjoint& adj, bool of_query, C* w) {
    const int64_t N = s.N, ld = s.ld();
    const RowRange part = s.part(of_query);
    bool used = false;
    int64_t k = 0;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      if (s.drive<B>(of_query, i) && phase.steps > 0) {
        const int64_t g_ld = s.is_joint<B>(i) ? ld : part.ld();
        const C *gs = adj.gs + s.packed<B>(i) + s.first_in_g<B>(of_query, i), *gag = adj.gag + k * N * ld;
        if (used)
          block.mm_add(part.count, phase.steps * N, ld, {gs, 1, g_ld}, gag, ld, w, ld);
        else
          block.mm(part.count, phase.steps * N, ld, {gs, 1, g_ld}, gag, ld, w, ld, nullptr);
        used = true;
      }
      k += phase.steps;
    }
    if (used && s.cosine) scale_gram(of_query, w);
    return used;
  }
};

}  // namespace kernelmeta
