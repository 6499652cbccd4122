// What the kernels for tasks that may differ in size share.
#pragma once

#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/program_bodies.h"

namespace kernelmeta::cuda {

// As make_plan, for a Layout that is laid out for each task.
template <class B, class Layout, class F, class... Args>
Plan make_task_plan(const void* kernel, const F& f, const std::vector<int64_t>& tasks, const Sizes& sizes,
                    int device, const Args&... args) {
  return make_plan_of<B>(kernel, f.problem.T, device, [&](int64_t capacity) {
    return task_memory<B, Layout>(f, tasks, capacity, sizes, args...);
  });
}

// f(Type of the Block)
template <class C, class Problem, class Fn>
auto with_task_block(const Problem& p, Fn f) {
  return with_storage<C>(p.support.features.storage, [&](auto feature) {
    return f(Type<CudaBlock<C, typename decltype(feature)::type>>{});
  });
}

}  // namespace kernelmeta::cuda
