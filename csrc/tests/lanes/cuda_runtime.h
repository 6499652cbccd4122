// Stands in for CUDA's own header where the kernels' sources are compiled as C++ and run lane by lane: CUDA's
// words, and as much of its runtime as the launchers use. A kernel is launched as fibers (machine.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "lanes/machine.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__  // (the C++ library has it within __attribute__)
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__

struct LaneIndex {
  struct X {
    unsigned (*get)();
    operator unsigned() const { return get(); }
  } x;
};
inline constexpr LaneIndex threadIdx{{lanes::thread_index}}, blockIdx{{lanes::block_index}},
    gridDim{{lanes::grid_size}};

inline int __syncthreads_or(int value) { return lanes::vote(value != 0); }

// Orders no memory.
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  T from;
  const auto* slots = lanes::exchange(lanes::Operation::kShuffle, &value, sizeof(T));
  std::memcpy(&from, slots[threadIdx.x % lanes::kWarp ^ unsigned(distance)].bytes, sizeof(T));
  return from;
}

inline bool __isShared(const void* p) { return lanes::is_shared(p); }
inline bool __isGlobal(const void* p) { return lanes::is_global(p); }
#define __builtin_assume(x) ((x) ? (void)0 : lanes::fault("an assumption that does not hold"))

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "a launch that no device would take"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const lanes::Device& device = lanes::device;
  *value = which == cudaDevAttrMultiProcessorCount ? device.multiprocessors : device.shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  of->sharedSizeBytes = lanes::kStaticShared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* resident, const void*, int, size_t) {
  *resident = 1;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto body = [&] {
    lanes::set_parameters(__builtin_frame_address(0), (((sizeof(Parameters) + 7) / 8 * 8) + ... + 0));
    kernel(Parameters(arguments)...);
  };
  return lanes::launch(
             config->gridDim, config->blockDim, config->dynamicSmemBytes,
             [](const void* of) { (*static_cast<const decltype(body)*>(of))(); }, &body)
             ? cudaSuccess
             : 1;
}
