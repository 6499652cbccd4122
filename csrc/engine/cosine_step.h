// One step of a cosine classifier and its adjoint, once for all loops, in the space of the rows;
// direct_step.h has the same in D dimensions.
//
// theta is a class's classifier, r = |theta|, h = theta / r, and U = Xhat h are its cosines with the
// normalised rows. With G the gradient of the loss with respect to Z = s (U + b), and e = learning rate * s,
// a step is
//
//   v = Xhat^T G,  dot = <h, v>,  w = v - dot h,  theta' = theta - (e / r) w
//
// U and r2 = r^2 are all that it needs: with A = Xhat Xhat^T the rows' Gram matrix, AG = A G and c = e dot /
// r2,
//
//   dot = sum(U G),  q = |v|^2 = sum(G AG)
//   r2' = r2 + e^2 (q - dot^2) / r2
//   U'  = (1 + c) (r / r') U - e / (r r') AG
//
// and, only if theta itself is wanted, theta = a theta0 + Xhat^T P with
//
//   P' = (1 + c) P - (e / r) G,   a' = (1 + c) a.
//
// This loses digits where v is nearly parallel to theta: q - dot^2 = |w|^2 is the small difference of large
// numbers, which e^2 may make large again; the rounding of r2' is that of the terms r2 and e^2 q / r2. And it
// takes U for cosines: an error in their scale, which theta itself does not know, grows by alpha^2 = ((1 + c)
// r / r')^2 a step, where the errors of directions, in D dimensions as here, grow by alpha. `loses` keeps
// count of both, and says where the first has become the larger one: whoever takes the steps does that task
// anew in D dimensions.
//
// Gradients lose digits where theta' is nearly parallel to all of the rows. A gradient of h' counts without
// its part along h', which leaves (A - U' U'^T) gU' of A gU' in the cosines: 1 - U'^2 of it where the rows
// are parallel to each other. In D dimensions h' is taken away from what lies along it, here by way of r2,
// whose rounding is that of many sums. `nearly_parallel` says so, and such tasks are done anew as well.
#pragma once

#include "engine/arena.h"

namespace kernelmeta {

// How much more may be lost here than in D dimensions. (A test lets nothing be lost: all tasks are done
// anew.)
#ifdef KERNELMETA_STEERED
inline double kMostLost = 1.5;
#else
inline constexpr double kMostLost = 1.5;
#endif

// One class's errors so far, in units of the precision: of its norm, and of its direction; both begin at 1. A
// step multiplies what was there by `growth` (the norm's twice) and makes |theta'|^2 of terms of this size,
// of which `left` is left. Whether too much is lost; true where something is NaN.
template <class B, class C>
KERNELMETA_INLINE bool loses(C* errors, C growth, C terms, C left) {
  const C cancelled = terms / left;
  errors[0] = growth * growth * errors[0] + cancelled;
  errors[1] = B::max(growth, -growth) * errors[1] + B::sqrt(cancelled);
  return !(errors[0] < C(kMostLost) * errors[1]);
}

// Of the rows that drive steps one at least has this much, squared, apart from theta.
inline constexpr double kLeastApart = 1.0 / 16;

// Whether none has, from a class's cosines; true where all are NaN.
template <class Row, class C>
KERNELMETA_INLINE bool nearly_parallel(Row row, const C* u) {
  const C apart = row.most([&](auto q) { return q.zero() + C(1) - q.load(u) * q.load(u); });
  return !(apart > C(kLeastApart));
}

// Scalars of one step and one class.
template <class B>
struct StepScalars {
  using C = typename B::Scalar;
  C c, pull, grown, r, r_next, alpha, beta;  // pull = e^2 q / r2; r2' = grown, U' = alpha U - beta AG

  KERNELMETA_INLINE StepScalars(C e, C r2, C dot, C q)
      : c(e * dot / r2),
        pull(e * e * q / r2),
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
  KERNELMETA_INLINE explicit LiveRow(Row row)
      : all(row), own(row), others(row.part(0, 0)), first(0), others_first(0) {}
  template <class Part>
  KERNELMETA_INLINE LiveRow(Row row, Part own, Part others)
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

// ... and after it. errors [2]: see `loses`; lost: set where too much is.
template <class C>
struct StepTo {
  C *r2, *u, *errors, *lost, *a, *p;
};

// P' = grown P - moved G
template <class Row, class C>
KERNELMETA_INLINE void move_coefficients(const LiveRow<Row>& row, const C* p, const C* g, C grown, C moved,
                                         C* to) {
  const C *own_p = p + row.first, *other_p = p + row.others_first;
  C *own_to = to + row.first, *other_to = to + row.others_first;
  row.own.each([&](auto q) { q.store(own_to, q.load(own_p) * grown - q.load(g) * moved); });
  row.others.each([&](auto q) { q.store(other_to, q.load(other_p) * grown); });
}

template <class B, class Row, class C = typename B::Scalar>
KERNELMETA_INLINE void cosine_step(const LiveRow<Row>& row, const StepFrom<C>& from, const StepTo<C>& to) {
  const C *u = from.u, *ag = from.ag, *g = from.g, *own_u = u + row.first, *own_ag = ag + row.first;
  const auto [dot, quad] = row.own
                               .sums([&](auto q) { return q.load(own_u) * q.load(g); },
                                     [&](auto q) { return q.load(g) * q.load(own_ag); })
                               .of;
  const StepScalars<B> v(from.e, from.r2, dot, quad);
  row.all.each([&](auto q) { q.store(to.u, q.load(u) * v.alpha - q.load(ag) * v.beta); });
  const bool parallel = nearly_parallel(row.own, to.u + row.first);
  row.all.one([&] {
    *to.r2 = v.grown;
    if (loses<B>(to.errors, v.alpha, from.r2 + v.pull, v.grown) || parallel) *to.lost = 1;
    if (to.a) *to.a = (C(1) + v.c) * *from.a;
  });
  if (to.p) move_coefficients(row, from.p, g, C(1) + v.c, from.e / v.r, to.p);
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
KERNELMETA_INLINE C cosine_step_backward(const LiveRow<Row>& row, const StepFrom<C>& from,
                                         const StepAdjoint<C>& adj) {
  const C e = from.e, r2 = from.r2;
  const C *u = from.u, *ag = from.ag, *g = from.g, *own_u = u + row.first, *own_ag = ag + row.first;
  C *gu = adj.gu, *own_gu = gu + row.first, *own_gag = adj.gag + row.first;
  const auto [dot, quad] = row.own
                               .sums([&](auto q) { return q.load(own_u) * q.load(g); },
                                     [&](auto q) { return q.load(g) * q.load(own_ag); })
                               .of;
  const StepScalars<B> v(e, r2, dot, quad);
  const auto [galpha, along_ag] = row.all
                                      .sums([&](auto q) { return q.load(gu) * q.load(u); },
                                            [&](auto q) { return q.load(gu) * q.load(ag); })
                                      .of;
  const C gbeta = -along_ag;
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
