// What the kernels for tasks that may differ in size share.
#pragma once

#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/program_bodies.h"

namespace kernelmeta::cuda {

// As make_plan, for a Layout that is laid out for each task: `tasks` has one of each size.
template <class B, class Layout, class C = typename B::Scalar, class... Args>
Plan make_task_plan(const void* kernel, int64_t T, const std::vector<int64_t>& tasks, const Sizes& sizes,
                    int device, const Args&... args) {
  return make_plan_of<B>(kernel, T, device, [&](int64_t capacity) {
    Used used;
    for (const int64_t t : tasks) {
      Arena<C> count(nullptr, capacity, nullptr);
      B block;
      Layout unused(count, block, sizes, args..., t);
      used.shared = std::max(used.shared, count.used());
      used.workspace = std::max(used.workspace, count.rest_used());
    }
    return used;
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
