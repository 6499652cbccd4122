// One step of a cosine classifier in the space of the rows, and its adjoint, for all loops that take it.
//
// With U the cosines of the normalised rows with a class, r2 = |theta|^2, G the gradient of the loss with
// respect to Z = s (U + b), A the rows' Gram matrix, AG = A G and e = learning rate * s:
//
//   dot = sum(U G),  q = sum(G AG),  c = e dot / r2
//   r2' = r2 + e^2 (q - dot^2) / r2
//   U'  = (1 + c) (r / r') U - e / (r r') AG
//
// and, only if theta itself is wanted, theta = a theta0 + Xhat^T P with
//
//   P' = (1 + c) P - (e / r) G,   a' = (1 + c) a.
#pragma once

#include "engine/arena.h"

namespace kernelmeta {

// Scalars of one step and one class.
template <class B>
struct StepScalars {
  using C = typename B::Scalar;
  C c, grown, r, r_next, alpha, beta;  // r2' = grown, U' = alpha U - beta AG

  __host__ __device__ __forceinline__ StepScalars(C e, C r2, C dot, C q)
      : c(e * dot / r2),
        grown(r2 + e * e * (q - dot * dot) / r2),
        r(B::sqrt(r2)),
        r_next(B::sqrt(grown)),
        alpha((C(1) + c) * r / r_next),
        beta(e / (r * r_next)) {}
};

// One class's row of arrays of the live rows: all of them, those whose G drives the step, which begin at
// `first`, and the others, which begin at `others_first`.
template <class Row>
struct LiveRow {
  Row all, own, others;
  int64_t first, others_first;

  // All rows drive the step.
  __host__ __device__ __forceinline__ explicit LiveRow(Row row)
      : all(row), own(row), others(row.part(0, 0)), first(0), others_first(0) {}
  template <class Part>
  __host__ __device__ __forceinline__ LiveRow(Row row, Part own, Part others)
      : all(row),
        own(row.part(own.first, own.count)),
        others(row.part(others.first, others.count)),
        first(own.first),
        others_first(others.first) {}
};

// One class before a step. g is of the rows that drive it, everything else of the live rows.
template <class C>
struct StepFrom {
  C e, r2;
  const C *u, *ag, *g;
  const C *a, *p;  // null unless theta is wanted
};

// ... and after it.
template <class C>
struct StepTo {
  C *r2, *u, *a, *p;
};

template <class B, class Row, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void cosine_step(const LiveRow<Row>& row, const StepFrom<C>& from,
                                                     const StepTo<C>& to) {
  const C *u = from.u, *ag = from.ag, *g = from.g, *own_u = u + row.first, *own_ag = ag + row.first;
  const C dot = row.own.sum([&](auto q) { return q.load(own_u) * q.load(g); });
  const C quad = row.own.sum([&](auto q) { return q.load(g) * q.load(own_ag); });
  const StepScalars<B> v(from.e, from.r2, dot, quad);
  row.all.each([&](auto q) { q.store(to.u, q.load(u) * v.alpha - q.load(ag) * v.beta); });
  row.all.one([&] {
    *to.r2 = v.grown;
    if (to.a) *to.a = (C(1) + v.c) * *from.a;
  });
  if (!to.p) return;
  const C moved = from.e / v.r;
  const C *own_p = from.p + row.first, *other_p = from.p + row.others_first;
  C *own_next = to.p + row.first, *other_next = to.p + row.others_first;
  row.own.each([&](auto q) { q.store(own_next, q.load(own_p) * (C(1) + v.c) - q.load(g) * moved); });
  row.others.each([&](auto q) { q.store(other_next, q.load(other_p) * (C(1) + v.c)); });
}

// Gradients of one class's state, of that after the step -> of that before it; gg (of the rows that drive
// the step) and gag are written. gp, ga: null, or with gradients of P' and a'.
template <class C>
struct StepAdjoint {
  C *gr2, *gu, *ga, *gp;
  C *gg, *gag;
};

// Returns the gradient of e.
template <class B, class Row, class C = typename B::Scalar>
__host__ __device__ __forceinline__ C cosine_step_backward(const LiveRow<Row>& row, const StepFrom<C>& from,
                                                           const StepAdjoint<C>& adj) {
  const C e = from.e, r2 = from.r2;
  const C *u = from.u, *ag = from.ag, *g = from.g, *own_u = u + row.first, *own_ag = ag + row.first;
  C *gu = adj.gu, *own_gu = gu + row.first, *own_gag = adj.gag + row.first;
  const C dot = row.own.sum([&](auto q) { return q.load(own_u) * q.load(g); });
  const C quad = row.own.sum([&](auto q) { return q.load(g) * q.load(own_ag); });
  const StepScalars<B> v(e, r2, dot, quad);
  const C galpha = row.all.sum([&](auto q) { return q.load(gu) * q.load(u); });
  const C gbeta = -row.all.sum([&](auto q) { return q.load(gu) * q.load(ag); });
  C gc = galpha * v.r / v.r_next;
  C gr2 = (galpha * v.alpha - gbeta * v.beta) / (2 * r2);
  const C ggrown = *adj.gr2 - (galpha * v.alpha + gbeta * v.beta) / (2 * v.grown);
  C ge = 0;
  C along_g = 0;  // of P' = (1 + c) P - (e / r) G
  if (adj.gp) {
    const C *gp = adj.gp, *own_gp = gp + row.first;
    gc += row.all.sum([&](auto q) { return q.load(gp) * q.load(from.p); }) + *adj.ga * *from.a;
    const C gp_g = row.own.sum([&](auto q) { return q.load(own_gp) * q.load(g); });
    gr2 += gp_g * e / (2 * v.r * r2);
    ge -= gp_g / v.r;
    along_g = -e / v.r;
  }
  const C growth = (quad - dot * dot) / r2;  // r2' = r2 + e^2 growth
  const C gq = ggrown * e * e / r2;
  const C gdot = gc * e / r2 - 2 * gq * dot;
  gr2 += ggrown * (C(1) - e * e * growth / r2) - gc * v.c / r2;
  ge += gbeta / (v.r * v.r_next) + gc * dot / r2 + 2 * ggrown * e * growth;
  row.own.each([&](auto q) {
    const auto gu_next = q.load(own_gu);
    q.store(adj.gg, q.load(own_u) * gdot + q.load(own_ag) * gq);
    q.store(own_gag, q.load(g) * gq - gu_next * v.beta);
    q.store(own_gu, q.load(g) * gdot + gu_next * v.alpha);
  });
  C *other_gu = gu + row.others_first, *other_gag = adj.gag + row.others_first;
  row.others.each([&](auto q) {
    const auto gu_next = q.load(other_gu);
    q.store(other_gag, gu_next * -v.beta);
    q.store(other_gu, gu_next * v.alpha);
  });
  if (adj.gp) {
    C* own_gp = adj.gp + row.first;
    row.own.each([&](auto q) { q.store(adj.gg, q.load(adj.gg) + q.load(own_gp) * along_g); });
    row.all.each([&](auto q) { q.store(adj.gp, q.load(adj.gp) * (C(1) + v.c)); });
    row.all.one([&] { *adj.ga *= C(1) + v.c; });
  }
  row.all.one([&] { *adj.gr2 = gr2; });
  return ge;
}

}  // namespace kernelmeta
