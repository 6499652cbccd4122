// The Gram matrix A of the normalised query rows, as the inner loop sees it: something to multiply with.
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

// Rows of one task's features, or of a bank that `index` points into.
template <class F>
struct Rows {
  const F* data;
  int64_t stride;        // in elements
  const int64_t* index;  // null: row i is row i

  __host__ __device__ __forceinline__ const F* operator()(int64_t i) const {
    return data + (index ? index[i] : i) * stride;
  }
};

// Whether A is worth forming. Per task, in multiplications: A itself takes Q^2 D / 2, once; without it every
// product A G is Xhat (Xhat^T G), 2 Q N D, once a step forward and once a step backward (and both routes to
// the gradient of the rows keep that proportion). So A pays unless the query rows are many and the steps few.
template <class S>
__host__ __device__ __forceinline__ bool forms_gram(const S& s, bool backward_follows) {
  return s.K > 0 && (backward_follows ? 8 : 4) * s.K * s.N >= s.Q;
}

template <class B>
struct GramMatrix {
  using C = typename B::Scalar;
  using F = typename B::Feature;

  B& block;
  const typename B::Sizes& s;
  Rows<F> rows;
  const C* inverse;  // [Q]: 1 / |x_q|
  C* matrix;         // [Q][ld], or null: not formed
  C* span;           // [N][D], scratch; only where it is not formed
  C* scaled;         // [N][ld], scratch; likewise

  // out = A g or, with `add`, out += A g; g and out are [N][ld] (A is symmetric).
  __host__ __device__ __forceinline__ void multiply(const C* g, C* out, bool add) const {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    if (matrix) {
      if (add)
        block.mm_add(N, Q, Q, {g, ld, 1}, matrix, ld, out, ld);
      else
        block.mm(N, Q, Q, {g, ld, 1}, matrix, ld, out, ld, nullptr);
      return;
    }
    project(g, span);
    block.dots(N, Rows<C>{span, s.D, nullptr}, Q, rows, s.D, scaled, ld);
    block.rows(N, Q, [&](int64_t n, auto row) {
      C* o = out + n * ld;
      row.each([&](auto q) {
        const auto value = q.load(scaled + n * ld) * q.load(inverse);
        q.store(o, add ? q.load(o) + value : value);
      });
    });
  }

  // to [N][D] = g [N][ld] times the normalised rows.
  __host__ __device__ __forceinline__ void project(const C* g, C* to) const {
    const int64_t ld = s.ld();
    block.unfenced().rows(s.N, s.Q, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(scaled + n * ld, q.load(g + n * ld) * q.load(inverse)); });
    });
    block.features_zero(s.N, s.D, to);
    block.features_mm_add(s.N, s.Q, s.D, {scaled, ld, 1}, rows, to);
  }
};

}  // namespace kernelmeta
