// Hands out consecutive pieces of one buffer, or of two: the second takes what does not fit the first. With
// null buffers it only counts, so a struct that takes its arrays from an Arena describes its own size: lay it
// out once to count, once for real.
#pragma once

#include "engine/portability.h"

namespace kernelmeta {

// Pieces start at multiples of this many elements, and row arrays are this much padded: a multiple of
// every vector width in use, so that sizes do not depend on the instruction set.
inline constexpr int64_t kAlign = 16;

KERNELMETA_INLINE constexpr int64_t padded(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

namespace {
// Local to each file, which is compiled for one instruction set.
template <class Arena>
KERNELMETA_SELDOM auto take_from(Arena& arena, int64_t n) {
  return arena.next(n);
}
}  // namespace

template <class C>
class Arena {
 public:
  KERNELMETA_INLINE explicit Arena(C* base = nullptr)
      : base_(base), capacity_(INT64_MAX), rest_(nullptr), two_(false) {}
  // `base` holds `capacity` elements.
  KERNELMETA_INLINE Arena(C* base, int64_t capacity, C* rest)
      : base_(base), capacity_(capacity), rest_(rest), two_(true) {}

  KERNELMETA_INLINE C* take(int64_t n) { return take_from(*this, n); }
  KERNELMETA_INLINE C* next(int64_t n) {
    C* piece;
    if (fits(n)) {
      piece = base_ ? base_ + used_ : nullptr;
      used_ += padded(n);
    } else {
      piece = rest_ ? rest_ + rest_used_ : nullptr;
      rest_used_ += padded(n);
    }
    return piece;
  }

  // The same for what is seldom used: with `aside` it is never in the first of two buffers.
  KERNELMETA_INLINE C* take_aside(int64_t n, bool aside) {
    if (!aside || !two_) return take(n);
    C* piece = rest_ ? rest_ + rest_used_ : nullptr;
    rest_used_ += padded(n);
    return piece;
  }

  // Whether the next piece, of n elements, comes out of the first buffer.
  KERNELMETA_INLINE bool fits(int64_t n) const { return padded(n) <= capacity_ - used_; }

  KERNELMETA_INLINE int64_t used() const { return used_; }
  KERNELMETA_INLINE int64_t rest_used() const { return rest_used_; }

 private:
  C* base_;
  int64_t capacity_;
  C* rest_;
  bool two_;
  int64_t used_ = 0, rest_used_ = 0;
};

}  // namespace kernelmeta
