// One source for g++, clang++ and nvcc: CUDA's function attributes, spelled for host compilers.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#endif

#ifdef __CUDACC__
#define KERNELMETA_NOINLINE __noinline__
#else
#define KERNELMETA_NOINLINE __attribute__((noinline))
#endif
