// One step of a cosine classifier in D dimensions, and its adjoint: what cosine_step.h says in the space of
// the rows, with theta itself in the place of its cosines. w, the part of the pull orthogonal to theta, is
// formed, and |theta'|^2 is a sum of squares: no digits are lost but those that theta itself loses. A step
// costs two products with the features, 2 rows N D multiplications each, where one with a Gram matrix costs
// rows^2 N.
//
// What is parallel to theta, or to a row, is taken away as a multiple of the unit vector, so that nothing at
// all is left where D = 1.
#pragma once

#include "engine/feature_rows.h"

namespace kernelmeta {

// F: of the features, which are normalised where `inverse` is null.
template <class B, class F>
struct DirectSteps {
  using C = typename B::Scalar;

  B& block;
  int64_t N, D, live, ld;  // live: the live rows, as arrays [N][ld] have them
  const C* inverse;        // [ld]: 1 / |x|, or null
  C* h;                    // [N][D], scratch: theta / |theta|
  C* scaled;               // [N][ld], scratch

  // theta [N][D] -> r2 [N]
  KERNELMETA_INLINE void norms(const C* theta, C* r2) const {
    block.unfenced().features(N, D, [&](int64_t n, auto row) {
      const C* t = theta + n * D;
      const C squares = row.sum([&](auto d) { return d.load(t) * d.load(t); });
      row.one([&] { r2[n] = floored_square<B>(squares); });
    });
  }

  // h = theta / |theta|
  KERNELMETA_INLINE void directions(const C* theta, const C* r2) const {
    block.features(N, D, [&](int64_t n, auto row) {
      const C r = B::sqrt(r2[n]);
      row.each([&](auto d) { d.store(h + n * D, d.load(theta + n * D) / r); });
    });
  }

  // Of one part of the live rows: u [N][ld] = cosines with h.
  __host__ __device__ KERNELMETA_NOINLINE void cosines(RowRange part, const FeatureRows<F>& rows,
                                                       C* u) const {
    block.dots(N, FeatureRows<C>{h, D, nullptr}, part.count, rows, D, u + part.first, ld);
    over_norms(block, u + part.first, ld, part, u + part.first, ld);
  }

  // to [N][D] = Xhat^T G, with g [N][part.ld()].
  __host__ __device__ KERNELMETA_NOINLINE void pull(const C* g, RowRange part, const FeatureRows<F>& rows,
                                                    C* to) const {
    over_norms(block.unfenced(), g, part.ld(), part, scaled, ld);
    block.features_zero(N, D, to);
    block.features_mm_add(N, part.count, D, {scaled, ld, 1}, rows, to);
  }

  // v = Xhat^T G in w [N][D] -> w, theta' (`next`) and its r2. h is that of theta.
  __host__ __device__ KERNELMETA_NOINLINE void step(const C* theta, const C* r2, C e, C* w, C* next,
                                                    C* next_r2) const {
    block.unfenced().features(N, D, [&](int64_t n, auto row) {
      const C *t = theta + n * D, *hn = h + n * D;
      C *v = w + n * D, *to = next + n * D;
      const C along = row.sum([&](auto d) { return d.load(v) * d.load(hn); });
      const C dot = theta_at_floor(r2[n]) ? C(0) : along;
      const C moved = e / B::sqrt(r2[n]);
      const C squares = row.sum([&](auto d) {
        const auto orthogonal = d.load(v) - d.load(hn) * dot;
        const auto value = d.load(t) - orthogonal * moved;
        d.store(v, orthogonal);
        d.store(to, value);
        return value * value;
      });
      row.one([&] { next_r2[n] = floored_square<B>(squares); });
    });
  }

  // What else than theta' depends on a class's step: of dot and of r; null: nothing.
  struct Others {
    const C *gdot, *gr;  // [N] each
  };

  // gtheta [N][D]: gradient of theta' -> of theta, but for what comes by way of v; gv [N][D]: gradient of v;
  // ge [N]: of e. dot [N] = <h, v>, zero where |theta| is at its floor; h is that of theta.
  __host__ __device__ KERNELMETA_NOINLINE void step_backward(const C* r2, const C* w, C e, const C* dot,
                                                             const Others& others, C* gtheta, C* gv,
                                                             C* ge) const {
    block.features(N, D, [&](int64_t n, auto row) {
      const C *hn = h + n * D, *orthogonal = w + n * D;
      C *g = gtheta + n * D, *to = gv + n * D;
      const C r = B::sqrt(r2[n]), share = e / r;
      const bool floored = theta_at_floor(r2[n]);
      const C along = row.sum([&](auto d) { return d.load(g) * d.load(hn); });
      const C g_h = floored ? C(0) : along;
      const C g_w = row.sum([&](auto d) { return d.load(g) * d.load(orthogonal); });
      const C gdot = others.gdot ? others.gdot[n] : C(0), gr = others.gr ? others.gr[n] : C(0);
      // With gw = -share g: gv = gw - <gw, h> h + gdot h, and of h: -dot gw + (gdot - <gw, h>) v, without its
      // part along h.
      const C of_w = gdot + share * g_h, of_h = floored ? C(0) : share * g_w / r + gr;
      row.each([&](auto d) {
        const auto gnext = d.load(g), across = gnext - d.load(hn) * g_h;
        d.store(to, across * -share + d.load(hn) * gdot);
        d.store(g,
                gnext + across * (dot[n] * share / r) + d.load(orthogonal) * (of_w / r) + d.load(hn) * of_h);
      });
      row.one([&] { ge[n] = -g_w / r; });
    });
  }

  // gv [N][D] -> gradient of g, gg [N][part.ld()]; added to that of the rows, over |x|, grows [count][D] (or
  // null).
  __host__ __device__ KERNELMETA_NOINLINE void pull_backward(const C* gv, const C* g, RowRange part,
                                                             const FeatureRows<F>& rows, C* gg,
                                                             C* grows) const {
    pull_backward(gv, g, part.ld(), part, rows, gg, grows);
  }

  // Both for a part of the rows of G: g and gg are [N][g_ld], and the pull is added to `to`.
  KERNELMETA_INLINE void add_pull(const C* g, int64_t g_ld, RowRange part, const FeatureRows<F>& rows,
                                  C* to) const {
    over_norms(block, g, g_ld, part, scaled, ld);
    block.features_mm_add(N, part.count, D, {scaled, ld, 1}, rows, to);
  }
  KERNELMETA_INLINE void pull_backward(const C* gv, const C* g, int64_t g_ld, RowRange part,
                                       const FeatureRows<F>& rows, C* gg, C* grows) const {
    block.dots(N, FeatureRows<C>{gv, D, nullptr}, part.count, rows, D, gg, g_ld);
    if (!grows) return over_norms(block, gg, g_ld, part, gg, g_ld);
    over_norms(block.unfenced(), gg, g_ld, part, gg, g_ld);
    over_norms(block, g, g_ld, part, scaled, ld);
    block.unfenced().features_mm_add(part.count, N, D, {scaled, 1, ld}, FeatureRows<C>{gv, D, nullptr},
                                     grows);
  }

  // gu [N][ld], gradient of a part's cosines with h: added to gtheta [N][D], and to that of the rows, over
  // |x|, grows [count][D] (or null). gh [N][D]: scratch.
  __host__ __device__ KERNELMETA_NOINLINE void cosines_backward(const C* r2, RowRange part,
                                                                const FeatureRows<F>& rows, const C* gu,
                                                                C* gh, C* gtheta, C* grows) const {
    over_norms(block.unfenced(), gu + part.first, ld, part, scaled, ld);
    block.features_zero(N, D, gh);
    block.features_mm_add(N, part.count, D, {scaled, ld, 1}, rows, gh);
    block.unfenced().features(N, D, [&](int64_t n, auto row) {
      const C *hn = h + n * D, *from = gh + n * D;
      C* g = gtheta + n * D;
      const C r = B::sqrt(r2[n]);
      const C along =
          theta_at_floor(r2[n]) ? C(0) : row.sum([&](auto d) { return d.load(from) * d.load(hn); });
      row.each([&](auto d) { d.store(g, d.load(g) + (d.load(from) - d.load(hn) * along) / r); });
    });
    if (!grows) return;
    block.features_mm_add(part.count, N, D, {scaled, 1, ld}, FeatureRows<C>{h, D, nullptr}, grows);
  }

 private:
  // to = from / |x|, of one part.
  template <class Words>
  KERNELMETA_INLINE void over_norms(const Words& words, const C* from, int64_t from_ld, RowRange part, C* to,
                                    int64_t to_ld) const {
    words.rows(N, part.count, [&](int64_t n, auto row) {
      row.each([&](auto q) {
        const auto value = q.load(from + n * from_ld);
        q.store(to + n * to_ld, inverse ? value * q.load(inverse + part.first) : value);
      });
    });
  }
};

}  // namespace kernelmeta
