// Sums with one term or more from every class and step, which may be large and of either sign.
#pragma once

#include "engine/arena.h"

namespace kernelmeta {

// sum += x, and the rounding is added to `rest`.
template <class C>
KERNELMETA_INLINE void add_exactly(C& sum, C& rest, C x) {
  const C before = sum;
  sum = before + x;
  const C added = sum - before;
  rest += (before - (sum - added)) + (x - added);
}

// One sum a class, added up in order at the end. Identical classes (those of repeated support rows) have
// opposite terms: what is left of them is not the rounding of each.
template <class C>
struct ClassSums {
  int64_t N;
  C *sums, *rests;  // [N]

  KERNELMETA_INLINE ClassSums(Arena<C>& arena, int64_t N) : N(N), sums(arena.take(N)), rests(arena.take(N)) {}

  KERNELMETA_INLINE void clear(int64_t n) const { sums[n] = rests[n] = 0; }
  KERNELMETA_INLINE void add(int64_t n, C x) const { add_exactly(sums[n], rests[n], x); }
  KERNELMETA_INLINE C total() const {
    C sum = 0, rest = 0;
    for (int64_t n = 0; n < N; ++n) {
      add_exactly(sum, rest, sums[n]);
      rest += rests[n];
    }
    return sum + rest;
  }
};

}  // namespace kernelmeta
