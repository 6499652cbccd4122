// What all kernels share: storage types, memory, planning, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/bodies.h"
#include "cuda/launch.h"
#include "cuda/team.h"

namespace kernelmeta::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it
  throw std::runtime_error(std::string("kernelmeta: ") + what + ": " + cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading a property of the device");
  return value;
}

// A block's memory: shared memory is the stage, then `capacity` elements; `workspace` elements for each block
// follow in global memory.
template <class C>
struct Memory {
  int64_t capacity;
  C* workspace;
  int64_t workspace_elements;

  template <class B>
  __device__ __forceinline__ Arena<C> arena() const {
    return Arena<C>(B::stage() + Staging<C>::kElements, capacity,
                    workspace + int64_t(blockIdx.x) * workspace_elements);
  }
};

__device__ __forceinline__ BlockTasks block_tasks() { return {int64_t(blockIdx.x), int64_t(gridDim.x)}; }

// How to run a kernel on T tasks; used(capacity): what a block lays out with so much shared memory.
template <class B, class Fn>
Plan make_plan_of(const void* kernel, int64_t T, int device, Fn used) {
  using C = typename B::Scalar;
  Plan plan;
  if (T == 0) return plan;
  const int64_t stage = Staging<C>::kElements * int64_t(sizeof(C));
  cudaFuncAttributes of_kernel;
  check(cudaFuncGetAttributes(&of_kernel, kernel),
        "no code for this device (TORCH_CUDA_ARCH_LIST at install time?)");
  const int64_t most =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int64_t(of_kernel.sharedSizeBytes);
  plan.capacity = (most - stage) / int64_t(sizeof(C)) / kAlign * kAlign;
  const Used laid_out = used(plan.capacity);
  if (laid_out.shared + laid_out.workspace > INT32_MAX)  // places within a task are 32 bits wide
    throw std::runtime_error("kernelmeta: a task is too large for a GPU: its arrays hold " +
                             std::to_string(laid_out.shared + laid_out.workspace) + " numbers");
  plan.workspace = laid_out.workspace;
  plan.shared_bytes = stage + laid_out.shared * int64_t(sizeof(C));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)),
        "asking for shared memory");
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, B::kThreads,
                                                      size_t(plan.shared_bytes)),
        "asking for the occupancy");
  if (resident < 1) throw std::runtime_error("kernelmeta: a kernel does not fit this device");
  const int64_t all = int64_t(resident) * attribute(cudaDevAttrMultiProcessorCount, device);
  plan.blocks = T < all ? T : all;
  return plan;
}

// The same for blocks that lay out a Layout, constructed from an arena, the block and the sizes, then args.
template <class B, class Layout, class C = typename B::Scalar, class... Args>
Plan make_plan(const void* kernel, const Sizes& sizes, int device, const Args&... args) {
  return make_plan_of<B>(kernel, sizes.T, device, [&](int64_t capacity) {
    Arena<C> count(nullptr, capacity, nullptr);
    B block;
    Layout unused(count, block, as<typename B::Sizes>(sizes), args...);
    return Used{count.used(), count.rest_used()};
  });
}

// Memory for a BlockMemory.
template <class B, class Layout>
__device__ __forceinline__ void* block_memory() {
  static __shared__ __align__(16) unsigned char place[sizeof(BlockMemory<B, Layout>)];
  return place;
}

template <class B, class Kernel, class... Args>
void launch(const char* name, Kernel* kernel, const Plan& plan, const Stream& stream, Args... args) {
  if (plan.blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(plan.blocks);
  config.blockDim = unsigned(B::kThreads);
  config.dynamicSmemBytes = size_t(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

// As many threads as registers allow: a task has one block to itself on a multiprocessor, so that nothing but
// the block's own warps hides what each of them waits for.
template <class C>
inline constexpr int kThreads = sizeof(C) == 4 ? 512 : 256;

template <class C, class F = C, class Z = Sizes>
using CudaBlock = TeamBlock<CudaTeam<kThreads<C>>, C, F, Z>;

template <class T>
struct Type {
  using type = T;
};

// f(Type of the stored features), for the types that meet this precision of the computation.
template <class C, class Fn>
auto with_storage(Storage storage, Fn f) {
  if constexpr (sizeof(C) == 8) {
    return f(Type<double>{});
  } else {
    if (storage == Storage::kBFloat16) return f(Type<__nv_bfloat16>{});
    if (storage == Storage::kFloat16) return f(Type<__half>{});
    return f(Type<float>{});
  }
}

// f(Type of the Block): with ways and hidden units known to the compiler where float32 meets the paper's
// sizes, and where features of float32 meet those of tasks with 10 or 20 ways.
template <class C, class Fn>
auto with_block(const Sizes& s, Storage storage, Fn f) {
  return with_storage<C>(storage, [&](auto feature) {
    using F = typename decltype(feature)::type;
    if constexpr (sizeof(C) == 4) {
      if (s.N == 5 && s.H == 40) return f(Type<CudaBlock<C, F, FixedSizes<5, 40>>>{});
      if constexpr (sizeof(F) == 4) {
        if (s.N == 10 && s.H == 80) return f(Type<CudaBlock<C, F, FixedSizes<10, 80>>>{});
        if (s.N == 20 && s.H == 160) return f(Type<CudaBlock<C, F, FixedSizes<20, 160>>>{});
      }
    }
    return f(Type<CudaBlock<C, F>>{});
  });
}

}  // namespace kernelmeta::cuda
