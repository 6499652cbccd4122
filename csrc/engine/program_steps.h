// The steps of a program, one of each kind, and their adjoints: from the state before it and G of the rows
// that drive it. program.h has the formulas.
#pragma once

#include "engine/euclidean_step.h"
#include "engine/program_oracles.h"

namespace kernelmeta {

// What the start of a soft assignment weighs in a class: its support rows, or one where (nearly) no row
// belongs to it, so that it stays where it is.
template <class C>
KERNELMETA_INLINE C anchor_weight(C support_rows, C mass) {
  return support_rows + mass < C(1e-12) ? C(1) : support_rows;
}

template <class B>
struct ProgramSteps : ProgramOracles<B> {
  using C = typename B::Scalar;
  using Adjoint = ProgramAdjoint<B>;
  using Asks = ProgramOracles<B>;
  using Asks::block, Asks::s, Asks::with, Asks::g, Asks::errors;

  using Asks::Asks;

  // ---- linear

  __host__ __device__ KERNELMETA_NOINLINE void linear_step(const ProgramTrace<C>& trace, RowRange part,
                                                           RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k];
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld;
      const C *u = trace.u + at, *ag = trace.ag + at;
      row.each([&](auto q) { q.store(trace.u + at + N * ld, q.load(u) - q.load(ag) * rate); });
      if (trace.p) {
        move_coefficients(LiveRow(row, part, others), trace.p + at, g + n * part.ld(), C(1), rate,
                          trace.p + at + N * ld);
      }
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void linear_backward(const ProgramTrace<C>& trace, RowRange part,
                                                               int64_t k, const Adjoint& adj, const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k];
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C *ag = trace.ag + (k * N + n) * ld, *gu = adj.gu + n * ld;
      C grate = -row.sum([&](auto q) { return q.load(gu) * q.load(ag); });
      row.each([&](auto q) { q.store(adj.gag + (k * N + n) * ld, q.load(gu) * -rate); });
      const auto of_part = row.part(part.first, part.count);
      C* gg = adj.gg + n * part.ld();
      if (adj.gp) {
        const C *gp = adj.gp + n * ld + part.first, *gn = gs + n * part.ld();
        grate -= of_part.sum([&](auto q) { return q.load(gp) * q.load(gn); });
        of_part.each([&](auto q) { q.store(gg, q.load(gp) * -rate); });
      } else {
        of_part.each([&](auto q) { q.store(gg, q.zero()); });
      }
      row.one([&] { adj.grate[n] = grate; });
    });
  }

  // ---- cosine

  // Class n before step k, whose G is gs [N][part.ld()].
  KERNELMETA_INLINE StepFrom<C> state(const ProgramTrace<C>& trace, RowRange part, int64_t k, int64_t n,
                                      const C* gs) const {
    const int64_t ld = s.ld(), i = k * s.N + n;
    return {with.rates[k] * with.scale,
            trace.r2[i],
            trace.u + i * ld,
            trace.ag + i * ld,
            gs + n * part.ld(),
            trace.a ? trace.a + i : nullptr,
            trace.p ? trace.p + i * ld : nullptr};
  }

  KERNELMETA_INLINE StepAdjoint<C> adjoint_of(RowRange part, int64_t k, int64_t n, const Adjoint& adj) const {
    const int64_t ld = s.ld(), i = n * ld;
    return {adj.gr2 + n,
            adj.gu + i,
            adj.gp ? adj.ga + n : nullptr,
            adj.gp ? adj.gp + i : nullptr,
            adj.gg + n * part.ld(),
            adj.gag + (k * s.N + n) * ld};
  }

  __host__ __device__ KERNELMETA_NOINLINE void step(const ProgramTrace<C>& trace, RowRange part,
                                                    RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      cosine_step<B>(LiveRow(row, part, others), state(trace, part, k, n, g),
                     {trace.r2 + i, trace.u + i * ld, errors + 2 * n, trace.lost + n,
                      trace.a ? trace.a + i : nullptr, trace.p ? trace.p + i * ld : nullptr});
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void step_backward(const ProgramTrace<C>& trace, RowRange part,
                                                             RowRange others, int64_t k, const Adjoint& adj,
                                                             const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C ge = cosine_step_backward<B>(LiveRow(row, part, others), state(trace, part, k, n, gs),
                                           adjoint_of(part, k, n, adj));
      row.one([&] {
        adj.gscale.add(n, with.rates[k] * ge);
        adj.grate[n] = with.scale * ge;
      });
    });
  }

  // ---- euclidean

  __host__ __device__ KERNELMETA_NOINLINE void step_of_distances(const ProgramTrace<C>& trace, RowRange part,
                                                                 RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      euclidean_step(LiveRow(row, part, others), state(trace, part, k, n, g),
                     {trace.r2 + i, trace.u + i * ld, nullptr, nullptr, trace.a ? trace.a + i : nullptr,
                      trace.p ? trace.p + i * ld : nullptr});
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void backward_of_distances(const ProgramTrace<C>& trace,
                                                                     RowRange part, RowRange others,
                                                                     int64_t k, const Adjoint& adj,
                                                                     const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C ge = euclidean_step_backward(LiveRow(row, part, others), state(trace, part, k, n, gs),
                                           adjoint_of(part, k, n, adj));
      row.one([&] {
        adj.gscale.add(n, with.rates[k] * ge);
        adj.grate[n] = with.scale * ge;
      });
    });
  }

  // ---- soft assignment

  // Scalars of one step and one class. `a` marks the classifier at the start of the phase.
  struct Assignment {
    C c, m, r, ra, na;  // weight of the anchor, total weight, |theta|, |theta_a|, |theta_a|^2
    C anchored;         // <theta_a, Xhat^T p>
    C along;            // <theta, new>
    C norm2;            // |new|^2
    C with_anchor;      // <new, theta_a>
    C next_r2;
    C terms;  // that it is the sum of, squared

    template <class Row>
    KERNELMETA_INLINE Assignment(const ProgramTrace<C>& t, const ProgramShape& s, C weight, C rate,
                                 Row of_part, RowRange part, int64_t start, int64_t k, int64_t n,
                                 const C* p) {
      const int64_t N = s.N, ld = s.ld();
      const C* u = t.u + (k * N + n) * ld + part.first;
      const C* ua = t.u + (start * N + n) * ld + part.first;
      const C* ap = t.ag + (k * N + n) * ld + part.first;
      const C r2 = t.r2[k * N + n];
      na = t.r2[start * N + n];
      r = B::sqrt(r2);
      ra = B::sqrt(na);
      const C sum = of_part.sum([&](auto q) { return q.load(p); });
      c = anchor_weight(weight, sum);
      m = c + sum;
      anchored = ra * of_part.sum([&](auto q) { return q.load(p) * q.load(ua); });
      const C pu = r * of_part.sum([&](auto q) { return q.load(p) * q.load(u); });
      const C pap = of_part.sum([&](auto q) { return q.load(p) * q.load(ap); });
      const C anchor = k == start ? na : t.anchor[k * N + n];
      along = (c * anchor + pu) / m;
      norm2 = (c * c * na + 2 * c * anchored + pap) / (m * m);
      with_anchor = (c * na + anchored) / m;
      const C kept = C(1) - rate;
      next_r2 = kept * kept * r2 + 2 * rate * kept * along + rate * rate * norm2;
      const C sizes = of_part.sum([&](auto q) {
        const auto of_row = q.load(p) * q.load(ap);
        return B::max(of_row, of_row * C(-1));
      });
      terms = kept * kept * r2 +
              rate * rate * (c * c * na + 2 * c * B::max(anchored, -anchored) + sizes) / (m * m);
    }
  };

  __host__ __device__ KERNELMETA_NOINLINE void assignment_step(const ProgramTrace<C>& trace, RowRange part,
                                                               int64_t start, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld, at_a = (start * N + n) * ld, next = at + N * ld;
      const C* p = g + n * part.ld();
      const auto of_part = row.part(part.first, part.count);
      const Assignment v(trace, s, with.class_sizes[n], rate, of_part, part, start, k, n, p);
      const C next_r2 = B::max(v.next_r2, C(kNormFloor) * C(kNormFloor));
      const C inverse = C(1) / B::sqrt(next_r2);
      const C of_u = kept * v.r * inverse, of_a = rate * v.c * v.ra / v.m * inverse,
              of_ap = rate / v.m * inverse;
      row.each([&](auto q) {
        q.store(trace.u + next,
                q.load(trace.u + at) * of_u + q.load(trace.u + at_a) * of_a + q.load(trace.ag + at) * of_ap);
      });
      const bool parallel = nearly_parallel(of_part, trace.u + next + part.first);
      row.one([&] {
        const C anchor = k == start ? v.na : trace.anchor[k * N + n];
        trace.r2[(k + 1) * N + n] = next_r2;
        if (loses<B>(errors + 2 * n, B::sqrt(v.terms / v.next_r2), v.terms, v.next_r2) || parallel)
          trace.lost[n] = 1;
        trace.anchor[(k + 1) * N + n] = kept * anchor + rate * v.with_anchor;
        if (trace.a) {
          trace.a[(k + 1) * N + n] = kept * trace.a[k * N + n] + rate * v.c * trace.a[start * N + n] / v.m;
        }
      });
      if (trace.p) {
        row.each([&](auto q) {
          q.store(trace.p + next, q.load(trace.p + at) * kept + q.load(trace.p + at_a) * (rate * v.c / v.m));
        });
        C* moved = trace.p + next + part.first;
        of_part.each([&](auto q) { q.store(moved, q.load(moved) + q.load(p) * (rate / v.m)); });
      }
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void assignment_backward(const ProgramTrace<C>& trace,
                                                                   RowRange part, int64_t start, int64_t k,
                                                                   const Adjoint& adj, const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld, at_a = (start * N + n) * ld;
      const C *p = gs + n * part.ld(), *u = trace.u + at, *ua = trace.u + at_a, *ap = trace.ag + at;
      C *gu = adj.gu + n * ld, *gra = adj.gra + n * ld, *gap = adj.gag + at, *gg = adj.gg + n * part.ld();
      const auto of_part = row.part(part.first, part.count);
      const Assignment v(trace, s, with.class_sizes[n], rate, of_part, part, start, k, n, p);
      const C floor2 = C(kNormFloor) * C(kNormFloor);
      const bool floored = !(v.next_r2 > floor2);
      const C next_r2 = floored ? floor2 : v.next_r2;
      const C anchor = k == start ? v.na : trace.anchor[k * N + n];
      const C r2 = trace.r2[k * N + n], share = v.c / v.m;
      const C inverse = C(1) / B::sqrt(next_r2);
      // gR' = gU' / r'; with T = (c R_a + A p) / m the state is R' = kept R + rate T.
      const C gu_u = row.sum([&](auto q) { return q.load(gu) * q.load(u); }) * inverse;
      const C gu_ua = row.sum([&](auto q) { return q.load(gu) * q.load(ua); }) * inverse;
      const C gu_ap = row.sum([&](auto q) { return q.load(gu) * q.load(ap); }) * inverse;
      const C gt_t = (v.c * v.ra * gu_ua + gu_ap) / v.m;  // <gR', T>
      const C gu_next = kept * v.r * gu_u + rate * gt_t;  // <gR', R'>
      const C gnext = floored ? C(0) : adj.gr2[n] - gu_next / (2 * next_r2);
      const C ganchor = adj.ganchor[n];
      C grate = gt_t - v.r * gu_u + ganchor * (v.with_anchor - anchor) +
                gnext * (2 * (C(1) - 2 * rate) * v.along - 2 * kept * r2 + 2 * rate * v.norm2);
      const C galong = 2 * rate * kept * gnext, gnorm2 = rate * rate * gnext, gwith = rate * ganchor;
      C gm = -(rate * gt_t + 2 * gnorm2 * v.norm2 + galong * v.along + gwith * v.with_anchor) / v.m;
      const C ganchored = (2 * gnorm2 * share + gwith) / v.m;
      const C gpap = gnorm2 / (v.m * v.m);
      if (adj.gp) {
        const C *gp = adj.gp + n * ld, *pa = trace.p + at_a, *pk = trace.p + at;
        const C gp_p = of_part.sum([&](auto q) { return q.load(gp + part.first) * q.load(p); });
        const C gp_pa = row.sum([&](auto q) { return q.load(gp) * q.load(pa); });
        const C gp_pk = row.sum([&](auto q) { return q.load(gp) * q.load(pk); });
        const C moved = (v.c * gp_pa + gp_p) / v.m;
        const C a_moved = share * trace.a[start * N + n] * adj.ga[n];
        grate += moved - gp_pk + a_moved - trace.a[k * N + n] * adj.ga[n];
        gm -= rate * (moved + a_moved) / v.m;
      }
      of_part.each([&](auto q) {
        const int64_t o = part.first;
        auto value = q.load(ua + o) * (ganchored * v.ra) + q.load(ap + o) * gpap +
                     q.load(u + o) * (galong * v.r / v.m) + gm;
        if (adj.gp) value = value + q.load(adj.gp + n * ld + o) * (rate / v.m);
        q.store(gg, value);
      });
      row.each([&](auto q) {
        const auto gr = q.load(gu) * inverse;
        q.store(gap, gr * (rate / v.m));
        q.store(gra, q.load(gra) + gr * (rate * share));
        q.store(gu, gr * kept);  // of R
      });
      of_part.each([&](auto q) {
        const int64_t o = part.first;
        q.store(gap + o, q.load(gap + o) + q.load(p) * gpap);
        q.store(gra + o, q.load(gra + o) + q.load(p) * ganchored);
        q.store(gu + o, q.load(gu + o) + q.load(p) * (galong / v.m));
      });
      if (adj.gp) {
        C *gp = adj.gp + n * ld, *gpa = adj.gpa + n * ld;
        row.each([&](auto q) {
          q.store(gpa, q.load(gpa) + q.load(gp) * (rate * share));
          q.store(gp, q.load(gp) * kept);
        });
        row.one([&] {
          adj.gaa[n] += rate * share * adj.ga[n];
          adj.ga[n] *= kept;
        });
      }
      const C gr_u = row.sum([&](auto q) { return q.load(gu) * q.load(u); });
      row.each([&](auto q) { q.store(gu, q.load(gu) * v.r); });
      row.one([&] {
        adj.gna[n] += gnorm2 * share * share + gwith * share;
        adj.ganchor[n] = kept * ganchor + galong * share;
        adj.gr2[n] = kept * kept * gnext + gr_u / (2 * v.r);
        adj.grate[n] = grate;
      });
    });
  }

  KERNELMETA_INLINE void clear_anchor(const Adjoint& adj) {
    const int64_t ld = s.ld();
    block.unfenced().rows(s.N, ld, [&](int64_t n, auto row) {
      row.one([&] { adj.ganchor[n] = adj.gna[n] = adj.gaa[n] = 0; });
      row.each([&](auto q) {
        q.store(adj.gra + n * ld, q.zero());
        if (adj.gpa) q.store(adj.gpa + n * ld, q.zero());
      });
    });
  }

  // What the steps of a phase asked of its anchor, which is the state at its start.
  KERNELMETA_INLINE void through_anchor(const ProgramTrace<C>& trace, int64_t start, const Adjoint& adj) {
    const int64_t N = s.N, ld = s.ld();
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      const C *u = trace.u + (start * N + n) * ld, *gra = adj.gra + n * ld;
      C* gu = adj.gu + n * ld;
      const C r = B::sqrt(trace.r2[start * N + n]);
      const C along = row.sum([&](auto q) { return q.load(gra) * q.load(u); });
      row.each([&](auto q) { q.store(gu, q.load(gu) + q.load(gra) * r); });
      row.one([&] {
        adj.gr2[n] += adj.ganchor[n] + adj.gna[n] + along / (2 * r);
        if (adj.ga) adj.ga[n] += adj.gaa[n];
      });
      if (adj.gp) {
        row.each(
            [&](auto q) { q.store(adj.gp + n * ld, q.load(adj.gp + n * ld) + q.load(adj.gpa + n * ld)); });
      }
    });
  }
};

}  // namespace kernelmeta
