// The team of a CUDA thread block; see block.h. Host code only lays out memory with it.
#pragma once

#include "cuda/block.h"
#include "cuda/tensor_core.h"

namespace kernelmeta {

template <int kCount>
struct CudaTeam {
  static constexpr int kThreads = kCount, kLanes = 32;

  static KERNELMETA_INLINE int thread() {
#ifdef __CUDA_ARCH__
    return int(threadIdx.x);
#else
    return 0;
#endif
  }
  static KERNELMETA_INLINE void sync(SourceLine) {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
  static KERNELMETA_INLINE bool any(bool value) {
#ifdef __CUDA_ARCH__
    return __syncthreads_or(value);
#else
    return value;
#endif
  }
  static KERNELMETA_INLINE void sync_warp() {
#ifdef __CUDA_ARCH__
    __syncwarp();
#endif
  }
  template <class C>
  static KERNELMETA_INLINE C add_lanes(C value) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
#endif
    return value;
  }
  template <class C>
  static KERNELMETA_INLINE C max_lanes(C value) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const C other = __shfl_xor_sync(0xffffffffu, value, distance);
      if (value < other) value = other;
    }
#endif
    return value;
  }
  // Rows of features for the tensor cores, and the sums of their products; see narrow_dots.h.
  template <class F>
  struct Left : MmaLeft<F> {
    Left() = default;
    KERNELMETA_INLINE Left(const F* rows, int stride) : MmaLeft<F>(rows, stride, thread() % kLanes) {}
  };
  template <class F>
  struct Right : MmaRight<F> {
    Right() = default;
    KERNELMETA_INLINE Right(const F* rows, int stride) : MmaRight<F>(rows, stride, thread() % kLanes) {}
  };
  struct Sums {
    static constexpr int kValues = MmaLanes::kSums;
    float values[kValues] = {};

    template <class F>
    KERNELMETA_INLINE void add(const Left<F>& a, const Right<F>& b) {
#ifdef __CUDA_ARCH__
      mma<F>(values, a, b);
#endif
    }
    template <class Fn>
    KERNELMETA_INLINE void each(Fn f) const {
      const int lane = thread() % kLanes;
#pragma unroll
      for (int r = 0; r < kValues; ++r)
        f(MmaLanes::sum_left(lane, r), MmaLanes::sum_right(lane, r), values[r]);
    }
  };

  // The beginning of the block's dynamic shared memory.
  template <class C>
  static KERNELMETA_INLINE C* stage() {
#ifdef __CUDA_ARCH__
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<C*>(memory);
#else
    return nullptr;
#endif
  }
};

}  // namespace kernelmeta
