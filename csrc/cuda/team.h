// The team of a CUDA thread block; see block.h. Host code only lays out memory with it.
#pragma once

#include "cuda/block.h"
#include "cuda/instructions.h"
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
  static KERNELMETA_INLINE void sync([[maybe_unused]] SourceLine line) {
#ifdef __CUDA_ARCH__
    sync_block(line);
#endif
  }
  static KERNELMETA_INLINE bool any(bool value) {
#ifdef __CUDA_ARCH__
    return __syncthreads_or(value);
#else
    return value;
#endif
  }
  static KERNELMETA_INLINE void sync_warp([[maybe_unused]] KERNELMETA_CALLER) {
#ifdef __CUDA_ARCH__
    sync_lanes({file, line});
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
  // 16 bytes into shared memory. They are there after the second await_copies() from the end_copies() that
  // follows, and a barrier.
  template <class C>
  static KERNELMETA_INLINE void copy_pack(const C* from, C* to) {
#ifdef __CUDA_ARCH__
    if (__isGlobal(from)) {
      copy_async_16(from, to);
      return;
    }
#endif
    *reinterpret_cast<Pack<C>*>(to) = *reinterpret_cast<const Pack<C>*>(from);
  }
  static KERNELMETA_INLINE void end_copies() {
#ifdef __CUDA_ARCH__
    commit_copies();
#endif
  }
  static KERNELMETA_INLINE void await_copies() {
#ifdef __CUDA_ARCH__
    wait_for_all_copies_but<1>();
#endif
  }
  // What the lane with this bit of its number flipped gives.
  template <class C>
  static KERNELMETA_INLINE C swap_lanes(C value, int bit) {
#ifdef __CUDA_ARCH__
    return __shfl_xor_sync(0xffffffffu, value, bit);
#else
    return value;
#endif
  }
  // Several at once: what one waits for, the others do.
  template <class C, int n>
  static KERNELMETA_INLINE void add_lanes(C (&values)[n]) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
    }
#endif
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
  // Rows of features for the tensor cores, and the sums of their products; see tensor_dots.h.
  template <class F>
  struct Left : MmaLeft<F> {
    Left() = default;
    KERNELMETA_INLINE Left(const uint32_t* rows, int stride) : MmaLeft<F>(rows, stride, thread() % kLanes) {}
  };
  template <class F>
  struct Right : MmaRight<F> {
    Right() = default;
    KERNELMETA_INLINE Right(const uint32_t* rows, int stride)
        : MmaRight<F>(rows, stride, thread() % kLanes) {}
  };
  template <class F>
  struct Sums : MmaSums<F> {
    static KERNELMETA_INLINE int left(int value) { return MmaLanes::sum_left(thread() % kLanes, value); }
    static KERNELMETA_INLINE int right(int value) { return MmaLanes::sum_right(thread() % kLanes, value); }
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
