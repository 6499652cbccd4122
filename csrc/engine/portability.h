// One source for g++, clang++ and nvcc: CUDA's function attributes, spelled for host compilers.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#endif

// What every function of the engine is: for both sides, and never a call.
#define KERNELMETA_INLINE __host__ __device__ __forceinline__

// What is inlined on a GPU alone: on a CPU it would be a large share of the code, and of no time.
#ifdef __CUDACC__
#define KERNELMETA_SELDOM KERNELMETA_INLINE
#else
#define KERNELMETA_SELDOM __attribute__((noinline))
#endif

// Before a loop: not to be unrolled on a GPU.
#ifdef __CUDACC__
#define KERNELMETA_ROLLED _Pragma("unroll 1")
#else
#define KERNELMETA_ROLLED
#endif

// A call, on both sides: registers are scarce on a GPU, and on a CPU code that is there once is compiled once
// and stays in the cache.
#ifdef __CUDACC__
#define KERNELMETA_NOINLINE __noinline__
#else
#define KERNELMETA_NOINLINE __attribute__((noinline))
#endif
