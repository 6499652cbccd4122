// What every op on CPU tensors needs between its arguments and its kernels.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu/arguments.h"

namespace {

using Optional = std::optional<Tensor>;

template <class C>
const Kernels<C>& kernels() {
  if constexpr (sizeof(C) == 4)
    return kernel_table().f32;
  else
    return kernel_table().f64;
}

// Calls f with a value of the type in which parameters of this dtype are computed with.
template <class F>
auto with_type(const Tensor& parameter, F f) {
  if (parameter.scalar_type() == ScalarType::Double) return f(double{});
  require(parameter.scalar_type() == ScalarType::Float, "parameters must be float32 or float64");
  return f(float{});
}

// How many items a thread must get before a second one is worth waking: some 20 us of work.
int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, 1'000'000 / std::max<int64_t>(work_per_item, 1));
}

template <class F>
void over_tasks(int64_t T, int64_t work, F f) {
  torch::stable::parallel_for(0, T, grain(work), f);
}

// Tasks split into chunks of about the same work: chunk c is bounds[c] .. bounds[c + 1]. They depend on the
// tasks alone, so that sums over chunks, added in order, have the same bits for any number of threads.
struct TaskChunks {
  std::vector<int64_t> bounds{0};
  int64_t work = 0;  // multiplications of all tasks, roughly

  TaskChunks() = default;
  explicit TaskChunks(const std::vector<int64_t>& work_of_each) {
    const int64_t T = int64_t(work_of_each.size());
    const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(T, 32));
    for (const int64_t w : work_of_each) work += w;
    int64_t t = 0, done = 0;
    for (int64_t c = 1; c < chunks; ++c) {
      for (; t < T && done * chunks < work * c; ++t) done += work_of_each[size_t(t)];
      bounds.push_back(t);
    }
    bounds.push_back(T);
  }
  int64_t count() const { return int64_t(bounds.size()) - 1; }
};

// f(begin, end) over ranges of tasks; every task's work times `factor` is what a call costs.
template <class F>
void over_chunks(const TaskChunks& chunks, int64_t factor, F f) {
  const auto& bounds = chunks.bounds;
  torch::stable::parallel_for(
      0, chunks.count(), grain(factor * chunks.work / chunks.count()),
      [&](int64_t begin, int64_t end) { f(bounds[size_t(begin)], bounds[size_t(end)]); });
}

// f(partial, begin, end) adds the sums over the tasks of a chunk to `partial`; the totals are returned.
template <class C, class F>
std::unique_ptr<C[]> sum_over_chunks(const TaskChunks& chunks, int64_t factor, int64_t size, F f) {
  const int64_t n = chunks.count();
  std::unique_ptr<C[]> sums(new C[size_t(size * n)]());
  torch::stable::parallel_for(0, n, grain(factor * chunks.work / n), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      f(sums.get() + c * size, chunks.bounds[size_t(c)], chunks.bounds[size_t(c + 1)]);
    }
  });
  for (int64_t c = 1; c < n; ++c) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[c * size + i];
  }
  return sums;
}

// The same for tasks of equal work.
template <class C, class F>
std::unique_ptr<C[]> sum_over_tasks(int64_t T, int64_t work, int64_t size, F f) {
  return sum_over_chunks<C>(TaskChunks(std::vector<int64_t>(size_t(T), work)), 1, size, f);
}

template <class C, class Layout, class... Args>
int64_t size_of(const Args&... args) {
  Arena<C> count;
  Layout unused(count, args...);
  return count.used();
}

struct MlpGradTensors {
  Tensor weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3;

  MlpGradTensors(const Sizes& s, ScalarType type)
      : weight1(empty({s.H, s.N}, type)),
        bias1(empty({s.H}, type)),
        gain1(empty({s.H}, type)),
        shift1(empty({s.H}, type)),
        weight2(empty({s.H, s.H}, type)),
        bias2(empty({s.H}, type)),
        gain2(empty({s.H}, type)),
        shift2(empty({s.H}, type)),
        weight3(empty({s.N, s.H}, type)),
        bias3(empty({s.N}, type)) {}

  template <class C>
  MlpArrays<C> arrays() const {
    return {data<C>(weight1), data<C>(bias1), data<C>(gain1),  data<C>(shift1),  data<C>(weight2),
            data<C>(bias2),   data<C>(gain2), data<C>(shift2), data<C>(weight3), data<C>(bias3)};
  }
};

}  // namespace
