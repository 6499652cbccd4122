// One step of a classifier by distances and its adjoint, in the space of the rows.
//
// Z = s (x w - |w|^2 / 2) is minus half of s |x - w|^2, but for what all classes have in common. With G the
// gradient of the loss with respect to Z, e = learning rate * s and sigma = sum(G) of a class, a step is
//
//   w' = (1 + e sigma) w - e X^T G
//
// U = X w and r2 = |w|^2 are all that it needs. With A = X X^T the rows' Gram matrix, AG = A G and c = e
// sigma,
//
//   U'  = (1 + c) U - e AG
//   r2' = (1 + c)^2 r2 - 2 (1 + c) e <U, G> + e^2 <G, AG>
//
// and w = a w0 + X^T P with P' = (1 + c) P - e G, a' = (1 + c) a.
//
// Where steps diverge, G is as large as r2, and <G, AG> out of range long before e^2 <G, AG> is: r2' is made
// of sums over e G.
#pragma once

#include "engine/cosine_step.h"

namespace kernelmeta {

// Of one class, with f and h e or 1: sum(G), <U, f G> and <f G, h AG>.
template <class C>
struct DistanceSums {
  C sigma, dot, quad;

  template <class Row>
  KERNELMETA_INLINE DistanceSums(const LiveRow<Row>& row, const StepFrom<C>& from, C f, C h)
      : sigma(row.own.sum([&](auto q) { return q.load(from.g); })) {
    const C *u = from.u + row.first, *ag = from.ag + row.first;
    const auto both = row.own.sums([&](auto q) { return q.load(u) * (q.load(from.g) * f); },
                                   [&](auto q) { return q.load(from.g) * f * (q.load(ag) * h); });
    dot = both.of[0];
    quad = both.of[1];
  }
};

// As cosine_step; of `to`, errors and lost are left alone.
template <class Row, class C>
KERNELMETA_INLINE void euclidean_step(const LiveRow<Row>& row, const StepFrom<C>& from, const StepTo<C>& to) {
  const C e = from.e;
  const DistanceSums<C> v(row, from, e, e);
  const C grown = C(1) + e * v.sigma;
  row.all.each([&](auto q) { q.store(to.u, q.load(from.u) * grown - q.load(from.ag) * e); });
  row.all.one([&] {
    *to.r2 = grown * (grown * from.r2 - 2 * v.dot) + v.quad;
    if (to.a) *to.a = grown * *from.a;
  });
  if (to.p) move_coefficients(row, from.p, from.g, grown, e, to.p);
}

// As cosine_step_backward.
template <class Row, class C>
KERNELMETA_INLINE C euclidean_step_backward(const LiveRow<Row>& row, const StepFrom<C>& from,
                                            const StepAdjoint<C>& adj) {
  const C e = from.e, gr2 = *adj.gr2;
  const DistanceSums<C> v(row, from, C(1), e);
  const C grown = C(1) + e * v.sigma;
  const C *own_u = from.u + row.first, *own_ag = from.ag + row.first;
  C *gu = adj.gu, *own_gu = gu + row.first, *own_gag = adj.gag + row.first;
  const auto along = row.all.sums([&](auto q) { return q.load(gu) * q.load(from.u); },
                                  [&](auto q) { return q.load(gu) * q.load(from.ag); });
  C ggrown = along.of[0] + 2 * gr2 * (grown * from.r2 - e * v.dot);
  C ge = -along.of[1] + 2 * gr2 * (v.quad - grown * v.dot);
  C along_g = 0;  // of P' = grown P - e G
  if (adj.gp) {
    const C *gp = adj.gp, *own_gp = gp + row.first;
    ggrown += row.all.sum([&](auto q) { return q.load(gp) * q.load(from.p); }) + *adj.ga * *from.a;
    ge -= row.own.sum([&](auto q) { return q.load(own_gp) * q.load(from.g); });
    along_g = -e;
  }
  ge += ggrown * v.sigma;
  const C gsigma = ggrown * e, gdot = -2 * grown * e * gr2, gquad = e * e * gr2;
  row.own.each([&](auto q) {
    const auto gu_next = q.load(own_gu);
    q.store(adj.gg, q.load(own_u) * gdot + q.load(own_ag) * gquad + gsigma);
    q.store(own_gag, q.load(from.g) * gquad - gu_next * e);
    q.store(own_gu, q.load(from.g) * gdot + gu_next * grown);
  });
  C *other_gu = gu + row.others_first, *other_gag = adj.gag + row.others_first;
  row.others.each([&](auto q) {
    const auto gu_next = q.load(other_gu);
    q.store(other_gag, gu_next * -e);
    q.store(other_gu, gu_next * grown);
  });
  if (adj.gp) {
    C* own_gp = adj.gp + row.first;
    row.own.each([&](auto q) { q.store(adj.gg, q.load(adj.gg) + q.load(own_gp) * along_g); });
    row.all.each([&](auto q) { q.store(adj.gp, q.load(adj.gp) * grown); });
    row.all.one([&] { *adj.ga *= grown; });
  }
  row.all.one([&] { *adj.gr2 = grown * grown * gr2; });
  return ge;
}

}  // namespace kernelmeta
