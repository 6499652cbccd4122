// Elements read in packs, and in the precision of the computation.
#pragma once

#include "engine/portability.h"

namespace kernelmeta {

// 16 bytes, read at once.
template <class C>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(C));
  C v[kSize];
};

// Whether all of these lie in shared memory (or are null); on the host, where there is none, they do.
template <class... T>
KERNELMETA_INLINE bool all_shared(const T*... p) {
#ifdef __CUDA_ARCH__
  return ((p == nullptr || __isShared(p)) && ...);
#else
  return ((void)p, ..., true);
#endif
}

// Says so to the compiler, whose loads and stores are then those of shared memory.
template <bool kShared, class T>
KERNELMETA_INLINE T* placed(T* p) {
#ifdef __CUDA_ARCH__
  if constexpr (kShared) __builtin_assume(__isShared(p));
#endif
  return p;
}

template <class Storage_, class C>
KERNELMETA_INLINE C widened(Storage_ x) {
  return C(float(x));
}
template <>
KERNELMETA_INLINE float widened<float, float>(float x) {
  return x;
}
template <>
KERNELMETA_INLINE double widened<double, double>(double x) {
  return x;
}

// Four features, of which `left` are there, widened; the others are zero.
template <class X, class C>
KERNELMETA_INLINE void read_four(const X* from, int64_t left, C (&to)[4]) {
  struct alignas(4 * sizeof(X)) Four {
    X v[4];
  };
  if (left >= 4 && reinterpret_cast<uintptr_t>(from) % sizeof(Four) == 0) {
    const Four four = *reinterpret_cast<const Four*>(from);
#pragma unroll
    for (int l = 0; l < 4; ++l) to[l] = widened<X, C>(four.v[l]);
  } else {
#pragma unroll
    for (int l = 0; l < 4; ++l) to[l] = l < left ? widened<X, C>(from[l]) : C(0);
  }
}

}  // namespace kernelmeta
