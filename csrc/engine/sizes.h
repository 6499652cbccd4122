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

  // Arrays with one entry per query row are stored rows innermost, [n][ld()]; entries Q..ld() are padding.
  __host__ __device__ __forceinline__ int64_t ld() const { return padded(Q); }
};

}  // namespace kernelmeta
