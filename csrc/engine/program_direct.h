// A program's steps on a cosine classifier in D dimensions, and their adjoint: for tasks that lose too many
// digits in the space of the rows (program.h). theta and what moved it are kept for every step; U, r2, P and
// a take the places in the trace that they have there.
#pragma once

#include "engine/program.h"

namespace kernelmeta {

// Gradients of the live rows, normalised, [S][D], [Q][D], added to; null where not wanted.
template <class C>
struct LiveFeatureGrad {
  C *support, *query;

  KERNELMETA_INLINE C* of(bool of_query) const { return of_query ? query : support; }
};

template <class B>
struct DirectProgram {
  using C = typename B::Scalar;
  using Steps = DirectSteps<B, C>;
  using Adjoint = typename ProgramLoop<B>::Adjoint;

  B& block;
  ProgramLoop<B>& loop;
  const ProgramShape& s;
  const ProgramParameters<C>& with;
  const ProgramTrace<C>& trace;
  C *unit_support, *unit_query;  // [S][D], [Q][D]: the live rows, normalised
  C *theta, *w;       // [K+1][N][D], [K][N][D]; of a soft assignment w is the mean that theta moves towards
  C *h, *scaled;      // [N][D], [N][ld], scratch
  C *mass, *weights;  // [N]: of a soft assignment, in all and of its start

  KERNELMETA_INLINE DirectProgram(Arena<C>& arena, ProgramLoop<B>& loop, const ProgramTrace<C>& trace)
      : block(loop.block),
        loop(loop),
        s(loop.s),
        with(loop.with),
        trace(trace),
        unit_support(take(arena, s.uses_support ? s.S * s.D : 0)),
        unit_query(take(arena, s.Q * s.D)),
        theta(take(arena, (s.K + 1) * s.N * s.D)),
        w(take(arena, s.K * s.N * s.D)),
        h(take(arena, s.N * s.D)),
        scaled(take(arena, s.N * s.ld())),
        mass(take(arena, s.N)),
        weights(take(arena, s.N)) {}

  // theta[0] and the normalised rows -> theta and w of every step, and the trace. again: U, r2, P and a are
  // there.
  __host__ __device__ KERNELMETA_NOINLINE void forward(bool again) {
    const int64_t ND = s.N * s.D;
    const Steps d = steps();
    if (!again) d.norms(theta, trace.r2);
    int64_t k = 0;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      const RowRange part = s.driving<B>(i);
      const int64_t start = k;
      for (const int64_t end = k + phase.steps; k < end; ++k) {
        cosines(d, k, again);
        ask(i, k, loop.g);
        C *from = theta + k * ND, *moved = w + k * ND;
        pull(d, i, loop.g, moved);
        if (phase.oracle == Oracle::kSoftAssignment)
          assign(part, start, k, again);
        else
          descend(d, part, s.others<B>(i), k, from, moved, again);
      }
    }
    cosines(d, k, again);
  }

  // grad_logits [Q][ways] -> adj.gtheta, gradient of theta at the start; gradients of parameters and rows are
  // added to. gp and ga as in ProgramLoop::backward.
  __host__ __device__ KERNELMETA_NOINLINE void backward(const C* grad_logits, int64_t ways,
                                                        const Adjoint& adj, const ProgramLoopGrad<C>& grad,
                                                        const LiveFeatureGrad<C>& of_rows) {
    const int64_t N = s.N;
    const Steps d = steps();
    loop.begin_backward(grad_logits, ways, adj);
    block.unfenced().features_zero(N, s.D, adj.gtheta);
    int64_t k = s.K;
    through_last_cosines(d, adj, of_rows);
    for (int64_t i = s.n_phases - 1; i >= 0; --i) {
      const Phase& phase = s.phases[i];
      const RowRange part = s.driving<B>(i);
      const bool assigns = phase.oracle == Oracle::kSoftAssignment;
      const int64_t start = k - phase.steps;
      if (assigns) clear_anchor(adj);
      while (k-- > start) {
        ask(i, k, adj.gs);
        d.directions(theta + k * N * s.D, trace.r2 + k * N);
        if (assigns)
          assign_backward(part, start, k, adj);
        else
          descend_backward(d, part, k, adj);
        loop.add_rate(k, adj, grad);
        if (s.is_joint<B>(i))
          pull_backward(d, i, adj, of_rows);
        else
          d.pull_backward(adj.gv, adj.gs, part, rows(phase.query), adj.gg, of_rows.of(phase.query));
        add_to_gg(part, k, assigns, adj);
        if (s.is_joint<B>(i)) {
          for (int64_t j = s.template first_of<B>(i); j <= i; ++j) {
            const Phase& asked = s.phases[j];
            loop.ask_back(trace, asked, s.part(asked.query), k, adj, grad);
            clear_gu(adj);
            through_cosines(d, k, asked.query, adj, of_rows, !blind_to_shift(asked.oracle));
          }
        } else {
          loop.ask_backward(phase, part, adj.gs, adj, grad);
          clear_gu(adj);
          through_cosines(d, k, phase.query, adj, of_rows, !blind_to_shift(phase.oracle));
        }
      }
      k = start;
      if (assigns) through_anchor(adj);
    }
    loop.finish_backward(adj, grad);
  }

 private:
  // Nothing where no classifier is a cosine.
  KERNELMETA_INLINE C* take(Arena<C>& arena, int64_t n) const {
    return arena.take_aside(s.cosine ? n : 0, true);
  }
  KERNELMETA_INLINE Steps steps() const { return {block, s.N, s.D, s.ld(), s.ld(), nullptr, h, scaled}; }
  KERNELMETA_INLINE FeatureRows<C> rows(bool of_query) const {
    return {of_query ? unit_query : unit_support, s.D, nullptr};
  }

  // to = G of step k of phase i.
  KERNELMETA_INLINE void ask(int64_t i, int64_t k, C* to) const {
    if (s.is_joint<B>(i)) return loop.ask_together(trace, i, k, to);
    loop.classify(trace, k, s.driving<B>(i));
    loop.ask(s.phases[i], s.driving<B>(i), to);
  }

  // to = Xhat^T G
  KERNELMETA_INLINE void pull(const Steps& d, int64_t i, const C* g, C* to) const {
    const bool own = s.phases[i].query;
    if (!s.is_joint<B>(i)) return d.pull(g, s.part(own), rows(own), to);
    block.unfenced().features_zero(s.N, s.D, to);
    each_driving(i, [&](RowRange part, bool of_query) {
      d.add_pull(g + part.first, s.ld(), part, rows(of_query), to);
    });
  }
  KERNELMETA_INLINE void pull_backward(const Steps& d, int64_t i, const Adjoint& adj,
                                       const LiveFeatureGrad<C>& of_rows) const {
    each_driving(i, [&](RowRange part, bool of_query) {
      d.pull_backward(adj.gv, adj.gs + part.first, s.ld(), part, rows(of_query), adj.gg + part.first,
                      of_rows.of(of_query));
    });
  }
  // f(part, of query rows)
  template <class Fn>
  KERNELMETA_INLINE void each_driving(int64_t i, Fn f) const {
    for (int of_query = 0; of_query < 2; ++of_query) {
      if (s.drive<B>(of_query, i)) f(s.part(of_query), bool(of_query));
    }
  }

  KERNELMETA_INLINE void cosines(const Steps& d, int64_t k, bool again) const {
    C* u = trace.u + k * s.N * s.ld();
    d.directions(theta + k * s.N * s.D, trace.r2 + k * s.N);
    if (again) return;
    if (s.uses_support) d.cosines(s.support(), rows(false), u);
    d.cosines(s.query(), rows(true), u);
  }

  KERNELMETA_INLINE void clear_gu(const Adjoint& adj) const {
    block.unfenced().rows(s.N, s.ld(), [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(adj.gu + n * s.ld(), q.zero()); });
    });
  }

  // adj.gz, of the rows of one kind before step k (or at the end) -> adj.gtheta and the rows. h is there.
  KERNELMETA_INLINE void through_cosines(const Steps& d, int64_t k, bool of_query, const Adjoint& adj,
                                         const LiveFeatureGrad<C>& of_rows, bool shifts = true) const {
    loop.through_classifier(trace, k, s.part(of_query), adj, shifts);
    d.cosines_backward(trace.r2 + k * s.N, s.part(of_query), rows(of_query), adj.gu, adj.gv, adj.gtheta,
                       of_rows.of(of_query));
  }

  // Those of the query rows at the end. (A function of its own: what it keeps leaves the stack.)
  __host__ __device__ KERNELMETA_NOINLINE void through_last_cosines(const Steps& d, const Adjoint& adj,
                                                                    const LiveFeatureGrad<C>& of_rows) const {
    d.directions(theta + s.K * s.N * s.D, trace.r2 + s.K * s.N);
    through_cosines(d, s.K, true, adj, of_rows);
  }

  // ---- steps along a gradient

  // <h, v>, zero where |theta| is at its floor.
  template <class Row>
  KERNELMETA_INLINE static C pull_along(Row own, const C* u, const C* g, C r2) {
    const C dot = own.sum([&](auto q) { return q.load(u) * q.load(g); });
    return theta_at_floor(r2) ? C(0) : dot;
  }

  KERNELMETA_INLINE void descend(const Steps& d, RowRange part, RowRange others, int64_t k, const C* from,
                                 C* moved, bool again) const {
    const int64_t N = s.N, ld = s.ld();
    const C e = with.rates[k] * with.scale;
    const C* r2 = trace.r2 + k * N;
    if (trace.p && !again) {
      block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
        const int64_t at = k * N + n;
        const C *u = trace.u + at * ld + part.first, *g = loop.g + n * part.ld();
        const LiveRow live(row, part, others);
        const C dot = pull_along(live.own, u, g, r2[n]);
        const C grown = C(1) + e * dot / r2[n];
        row.one([&] { trace.a[at + N] = grown * trace.a[at]; });
        move_coefficients(live, trace.p + at * ld, g, grown, e / B::sqrt(r2[n]), trace.p + (at + N) * ld);
      });
    }
    d.step(from, r2, e, moved, theta + (k + 1) * N * s.D, trace.r2 + (k + 1) * N);
  }

  KERNELMETA_INLINE void descend_backward(const Steps& d, RowRange part, int64_t k,
                                          const Adjoint& adj) const {
    const int64_t N = s.N, ND = N * s.D, ld = s.ld();
    const C e = with.rates[k] * with.scale;
    const C* r2 = trace.r2 + k * N;
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      const C *u = trace.u + (k * N + n) * ld + part.first, *g = adj.gs + n * part.ld();
      const auto own = row.part(part.first, part.count);
      const C dot = pull_along(own, u, g, r2[n]);
      C gc = 0, along_g = 0;
      const C r = B::sqrt(r2[n]);
      if (adj.gp) {
        const C *gp = adj.gp + n * ld, *p = trace.p + (k * N + n) * ld;
        gc = row.sum([&](auto q) { return q.load(gp) * q.load(p); }) + adj.ga[n] * trace.a[k * N + n];
        along_g = own.sum([&](auto q) { return q.load(gp + part.first) * q.load(g); });
      }
      const C c = e * dot / r2[n];
      row.one([&] {
        adj.dot[n] = dot;
        adj.gdot[n] = theta_at_floor(r2[n]) ? C(0) : gc * e / r2[n];
        adj.gr[n] = along_g * e / r2[n] - 2 * gc * c / r;
        adj.m[n] = gc * dot / r2[n] - along_g / r;  // of e
      });
    });
    d.step_backward(r2, w + k * ND, e, adj.dot, {adj.gdot, adj.gr}, adj.gtheta, adj.gv, adj.ge);
    block.rows(N, ld, [&](int64_t n, auto row) {
      row.one([&] {
        const C ge = adj.ge[n] + adj.m[n];
        adj.gscale.add(n, with.rates[k] * ge);
        adj.grate[n] = with.scale * ge;
      });
    });
  }

  // What else than the pull depends on G: the coefficients, and the mass of a soft assignment.
  KERNELMETA_INLINE void add_to_gg(RowRange part, int64_t k, bool assigns, const Adjoint& adj) const {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k], e = rate * with.scale;
    block.rows(N, ld, [&](int64_t n, auto row) {
      C* gg = adj.gg + n * part.ld();
      const auto own = row.part(part.first, part.count);
      const C *u = trace.u + (k * N + n) * ld + part.first, *g = adj.gs + n * part.ld();
      C of_gp, grown;
      if (assigns) {
        of_gp = rate / adj.m[n];
        grown = C(1) - rate;
        own.each([&](auto q) { q.store(gg, q.load(gg) + adj.dot[n]); });
      } else if (adj.gp) {
        const C r2 = trace.r2[k * N + n];
        of_gp = -e / B::sqrt(r2);
        grown = C(1) + e * pull_along(own, u, g, r2) / r2;
      }
      if (!adj.gp) return;
      C* gp = adj.gp + n * ld;
      own.each([&](auto q) { q.store(gg, q.load(gg) + q.load(gp + part.first) * of_gp); });
      row.each([&](auto q) { q.store(gp, q.load(gp) * grown); });
      row.one([&] { adj.ga[n] *= grown; });
    });
  }

  // ---- soft assignment: theta' = (1 - rate) theta + rate (c theta_a + Xhat^T p) / m

  // Xhat^T p in w -> the mean that theta moves towards.
  KERNELMETA_INLINE void assign(RowRange part, int64_t start, int64_t k, bool again) const {
    const int64_t N = s.N, D = s.D, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = k * N + n, at_a = start * N + n;
      const C* p = loop.g + n * part.ld();
      const auto own = row.part(part.first, part.count);
      const C sum = own.sum([&](auto q) { return q.load(p); });
      const C c = anchor_weight(with.class_sizes[n], sum), m = c + sum;
      row.one([&] {
        weights[n] = c;
        mass[n] = m;
        if (trace.a && !again) trace.a[at + N] = kept * trace.a[at] + rate * c * trace.a[at_a] / m;
      });
      if (!trace.p || again) return;
      const C *pk = trace.p + at * ld, *pa = trace.p + at_a * ld;
      C *next = trace.p + (at + N) * ld, *moved = next + part.first;
      row.each([&](auto q) { q.store(next, q.load(pk) * kept + q.load(pa) * (rate * c / m)); });
      own.each([&](auto q) { q.store(moved, q.load(moved) + q.load(p) * (rate / m)); });
    });
    block.unfenced().features(N, D, [&](int64_t n, auto row) {
      const C *t = theta + (k * N + n) * D, *ta = theta + (start * N + n) * D;
      C *mean = w + (k * N + n) * D, *next = theta + ((k + 1) * N + n) * D;
      const C c = weights[n], inverse = C(1) / mass[n];
      const C squares = row.sum([&](auto d) {
        const auto towards = (d.load(ta) * c + d.load(mean)) * inverse;
        const auto value = d.load(t) * kept + towards * rate;
        d.store(mean, towards);
        d.store(next, value);
        return value * value;
      });
      row.one([&] { trace.r2[(k + 1) * N + n] = floored_square<B>(squares); });
    });
  }

  // adj.dot: gradient of m.
  KERNELMETA_INLINE void assign_backward(RowRange part, int64_t start, int64_t k, const Adjoint& adj) const {
    const int64_t N = s.N, D = s.D, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = k * N + n, at_a = start * N + n;
      const C* p = adj.gs + n * part.ld();
      const auto own = row.part(part.first, part.count);
      const C sum = own.sum([&](auto q) { return q.load(p); });
      const C c = anchor_weight(with.class_sizes[n], sum), m = c + sum;
      C moved = 0, stayed = 0;  // along the gradients of P' and a'
      if (adj.gp) {
        C *gp = adj.gp + n * ld, *gpa = adj.gpa + n * ld;
        const C *pk = trace.p + at * ld, *pa = trace.p + at_a * ld;
        const C gp_p = own.sum([&](auto q) { return q.load(gp + part.first) * q.load(p); });
        const C gp_pa = row.sum([&](auto q) { return q.load(gp) * q.load(pa); });
        const C gp_pk = row.sum([&](auto q) { return q.load(gp) * q.load(pk); });
        moved = (c * gp_pa + gp_p + c * trace.a[at_a] * adj.ga[n]) / m;
        stayed = gp_pk + trace.a[at] * adj.ga[n];
        row.each([&](auto q) { q.store(gpa, q.load(gpa) + q.load(gp) * (rate * c / m)); });
        row.one([&] { adj.gaa[n] += rate * c / m * adj.ga[n]; });
      }
      row.one([&] {
        weights[n] = c;
        adj.m[n] = m;
        adj.dot[n] = -rate * moved / m;
        adj.grate[n] = moved - stayed;
      });
    });
    block.features(N, D, [&](int64_t n, auto row) {
      const C *t = theta + (k * N + n) * D, *mean = w + (k * N + n) * D;
      C *g = adj.gtheta + n * D, *gv = adj.gv + n * D, *ga = adj.gtheta_a + n * D;
      const C c = weights[n], share = rate / adj.m[n];
      const C g_mean = row.sum([&](auto d) { return d.load(g) * d.load(mean); });
      const C g_t = row.sum([&](auto d) { return d.load(g) * d.load(t); });
      row.each([&](auto d) {
        const auto gnext = d.load(g);
        d.store(gv, gnext * share);
        d.store(ga, d.load(ga) + gnext * (share * c));
        d.store(g, gnext * kept);
      });
      row.one([&] {
        adj.dot[n] -= share * g_mean;
        adj.grate[n] += g_mean - g_t;
      });
    });
  }

  KERNELMETA_INLINE void clear_anchor(const Adjoint& adj) const {
    block.unfenced().features(s.N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) { d.store(adj.gtheta_a + n * s.D, d.zero()); });
    });
    block.unfenced().rows(s.N, s.ld(), [&](int64_t n, auto row) {
      row.one([&] { adj.gaa[n] = 0; });
      if (adj.gpa) row.each([&](auto q) { q.store(adj.gpa + n * s.ld(), q.zero()); });
    });
  }

  KERNELMETA_INLINE void through_anchor(const Adjoint& adj) const {
    block.unfenced().features(s.N, s.D, [&](int64_t n, auto row) {
      C* g = adj.gtheta + n * s.D;
      row.each([&](auto d) { d.store(g, d.load(g) + d.load(adj.gtheta_a + n * s.D)); });
    });
    if (!adj.gp) return;
    block.unfenced().rows(s.N, s.ld(), [&](int64_t n, auto row) {
      C* gp = adj.gp + n * s.ld();
      row.each([&](auto q) { q.store(gp, q.load(gp) + q.load(adj.gpa + n * s.ld())); });
      row.one([&] { adj.ga[n] += adj.gaa[n]; });
    });
  }
};

}  // namespace kernelmeta
