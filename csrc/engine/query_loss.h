// The cross entropy of a task's query rows, once their labels are known: its gradient, and what a training
// loop reports. On a CPU: the sums are one thread's.
#pragma once

#include "engine/oracles.h"

namespace kernelmeta {

template <class B>
struct QueryLoss {
  using C = typename B::Scalar;

  B& block;
  const Sizes& s;
  C *z, *p;  // [N][ld], scratch

  __forceinline__ QueryLoss(Arena<C>& arena, B& block, const Sizes& s)
      : block(block), s(s), z(arena.take(s.N * s.ld())), p(arena.take(s.N * s.ld())) {}

  // logits [Q][N], labels [Q] -> gradient [Q][N] of `share` times the sum over rows of -log
  // softmax(z)[label]; adds to sums[0] that sum over rows, and to sums[1] the rows whose own class has the
  // largest logit.
  void operator()(const C* logits, const int64_t* labels, C share, C* gradient, C* sums) const {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t q = 0; q < Q; ++q) z[n * ld + q] = logits[q * N + n];
      for (int64_t q = Q; q < ld; ++q) z[n * ld + q] = 0;
    }
    C losses = 0, right = 0;
    // (softmax returns log sum exp for a vector of rows; it takes the place of the first class' logits)
    for (int64_t q = 0; q < Q; ++q) losses -= z[labels[q] * ld + q];
    for (int64_t q = 0; q < Q; ++q) {
      bool largest = true;
      const C own = z[labels[q] * ld + q];
      for (int64_t n = 0; n < N; ++n) largest = largest && own >= z[n * ld + q];
      right += largest;
    }
    block.columns(Q, [&](auto at) { at.store(z, softmax<B>(at, N, ld, z, p)); });
    for (int64_t q = 0; q < Q; ++q) {
      losses += z[q];
      for (int64_t n = 0; n < N; ++n) gradient[q * N + n] = p[n * ld + q] * share;
      gradient[q * N + labels[q]] -= share;
    }
    sums[0] += losses;
    sums[1] += right;
  }
};

}  // namespace kernelmeta
