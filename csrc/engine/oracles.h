// Oracles: where a step's gradient with respect to the logits comes from. One struct each: `gradient` turns
// the logits of one row into G, `backward` is its derivative. Row entries lie `ld` apart, one for each of N
// classes.
//
// To add one: a struct with these two functions, an entry in `Oracle` and in `with_oracle`, its name and
// formula in kernelmeta/reference/oracles.py.
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

enum class Oracle : int64_t { kCrossEntropy, kSquaredError, kHinge };

// What an oracle knows about a row besides its logits.
template <class C>
struct RowTarget {
  int64_t label;
  C share;  // 1 / number of rows: losses are means over the rows
};

// loss = -log softmax(z)[label];  g = softmax(z) - one_hot(label)
struct CrossEntropy {
  template <class B, class C>
  __host__ __device__ __forceinline__ static void gradient(const C* z, int64_t ld, int64_t N, RowTarget<C> t,
                                                           C* g) {
    C most = z[0], sum = 0;
    for (int64_t n = 1; n < N; ++n) most = B::max(most, z[n * ld]);
    for (int64_t n = 0; n < N; ++n) sum += g[n * ld] = B::exp(z[n * ld] - most);
    for (int64_t n = 0; n < N; ++n) g[n * ld] = (g[n * ld] / sum - C(n == t.label)) * t.share;
  }
  template <class B, class C>
  __host__ __device__ __forceinline__ static void backward(const C*, const C* g, const C* gg, int64_t ld,
                                                           int64_t N, RowTarget<C> t, C* gz) {
    C along = 0;
    for (int64_t n = 0; n < N; ++n) along += (g[n * ld] / t.share + C(n == t.label)) * gg[n * ld];
    for (int64_t n = 0; n < N; ++n) {
      const C p = g[n * ld] / t.share + C(n == t.label);
      gz[n * ld] = p * (gg[n * ld] - along) * t.share;
    }
  }
};

// loss = |z - one_hot(label)|^2 / 2;  g = z - one_hot(label)
struct SquaredError {
  template <class B, class C>
  __host__ __device__ __forceinline__ static void gradient(const C* z, int64_t ld, int64_t N, RowTarget<C> t,
                                                           C* g) {
    for (int64_t n = 0; n < N; ++n) g[n * ld] = (z[n * ld] - C(n == t.label)) * t.share;
  }
  template <class B, class C>
  __host__ __device__ __forceinline__ static void backward(const C*, const C*, const C* gg, int64_t ld,
                                                           int64_t N, RowTarget<C> t, C* gz) {
    for (int64_t n = 0; n < N; ++n) gz[n * ld] = gg[n * ld] * t.share;
  }
};

// loss = sum over the other classes of max(0, 1 + z[n] - z[label]) (Weston & Watkins 1999)
struct Hinge {
  template <class B, class C>
  __host__ __device__ __forceinline__ static void gradient(const C* z, int64_t ld, int64_t N, RowTarget<C> t,
                                                           C* g) {
    C violated = 0;
    for (int64_t n = 0; n < N; ++n) {
      const C margin = C(1) + z[n * ld] - z[t.label * ld];
      const C one = n == t.label ? C(0) : margin > 0 ? C(1) : margin <= 0 ? C(0) : margin;  // NaN stays NaN
      g[n * ld] = one * t.share;
      violated += one;
    }
    g[t.label * ld] = -violated * t.share;
  }
  template <class B, class C>
  __host__ __device__ __forceinline__ static void backward(const C*, const C*, const C*, int64_t ld,
                                                           int64_t N, RowTarget<C>, C* gz) {
    for (int64_t n = 0; n < N; ++n) gz[n * ld] = 0;
  }
};

// f(oracle) with the struct of that name.
template <class F>
__host__ __device__ __forceinline__ void with_oracle(Oracle name, F f) {
  if (name == Oracle::kCrossEntropy)
    f(CrossEntropy{});
  else if (name == Oracle::kSquaredError)
    f(SquaredError{});
  else
    f(Hinge{});
}

}  // namespace kernelmeta
