// Hands out consecutive pieces of one buffer. With a null buffer it only counts, so a struct that
// takes its arrays from an Arena describes its own size: lay it out once to count, once for real.
#pragma once

#include "engine/portability.h"

namespace kernelmeta {

// Pieces start at multiples of this many elements, and row arrays are this much padded: a multiple of
// every vector width in use, so that sizes do not depend on the instruction set.
inline constexpr int64_t kAlign = 16;

__host__ __device__ __forceinline__ constexpr int64_t padded(int64_t n) {
  return (n + kAlign - 1) / kAlign * kAlign;
}

template <class C>
class Arena {
 public:
  __host__ __device__ __forceinline__ explicit Arena(C* base = nullptr) : base_(base) {}

  __host__ __device__ __forceinline__ C* take(int64_t n) {
    C* piece = base_ ? base_ + used_ : nullptr;
    used_ += padded(n);
    return piece;
  }

  __host__ __device__ __forceinline__ int64_t used() const { return used_; }

 private:
  C* base_;
  int64_t used_ = 0;
};

}  // namespace kernelmeta
