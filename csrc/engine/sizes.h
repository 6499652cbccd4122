// The sizes of a problem, always in this order and by these names.
#pragma once

#include "engine/arena.h"

namespace kernelmeta {

struct Sizes {
  int64_t T;  // tasks
  int64_t S;  // support rows
  int64_t Q;  // query rows
  int64_t N;  // ways
  int64_t D;  // features
  int64_t H;  // hidden units of the synthetic-gradient MLP
  int64_t K;  // steps
  // The MLP looks at pairs of a query row and a class, one after the other: Q counts these, and N their
  // inputs.
  bool pairs = false;

  // Arrays with one entry per query row are stored rows innermost, [n][ld()]; entries Q..ld() are padding.
  KERNELMETA_INLINE int64_t ld() const { return padded(Q); }
  // Of the MLP.
  KERNELMETA_INLINE int64_t outputs() const { return pairs ? 1 : N; }
};

// The same with ways and hidden units known to the compiler. Holds nothing of its own: sizes that have these
// ways and hidden units may be looked at as FixedSizes where they stand (`as`).
template <int kN, int kH>
struct FixedSizes : Sizes {
  static constexpr int64_t N = kN, H = kH;
  KERNELMETA_INLINE static constexpr int64_t outputs() { return kN; }
};

template <class Z>
KERNELMETA_INLINE const Z& as(const Sizes& s) {
  static_assert(sizeof(Z) == sizeof(Sizes));
  return static_cast<const Z&>(s);
}

}  // namespace kernelmeta
