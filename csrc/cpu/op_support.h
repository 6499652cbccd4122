// What every op on CPU tensors needs between its arguments and its kernels.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>

#include <memory>

#include "arguments.h"
#include "cpu/class_lists.h"
#include "cpu/kernel_table.h"
#include "engine/serial_block.h"

namespace {

template <class C>
const Kernels<C>& kernels() {
  if constexpr (sizeof(C) == 4)
    return kernel_table().f32;
  else
    return kernel_table().f64;
}

// An uninitialised tensor for what a forward pass leaves to the backward pass. Where it is large, its memory
// comes fresh from the system at every call: in pages of 2 MiB where the system has them, 512 times fewer of
// them to be asked for one by one.
template <class C>
Tensor empty_trace(const std::vector<int64_t>& shape) {
  Tensor trace = empty(shape, kType<C>);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(trace.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + uintptr_t(trace.numel()) * sizeof(C)) / kPage * kPage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return trace;
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

// The MLP with gain and shift folded in, once a call.
template <class C>
class Folded {
 public:
  Folded(const MlpParameters<C>& p, const Sizes& s)
      : memory_(new C[size_t(size_of<FoldedMlp<C>, C>(s, p.running() != nullptr))]),
        arena_(memory_.get()),
        mlp_(arena_, s, p.running() != nullptr) {
    SerialBlock<C> block;
    fold(block, p.arrays(), p.running(), s, mlp_);
  }
  operator const FoldedMlp<C>&() const { return mlp_; }

 private:
  std::unique_ptr<C[]> memory_;
  Arena<C> arena_;
  FoldedMlp<C> mlp_;
};

template <class C>
void unfold_into(const MlpGradTensors& to, const MlpParameters<C>& p, const FoldedMlpGrad<C>& folded,
                 const Sizes& s) {
  SerialBlock<C> block;
  unfold(block, p.arrays(), folded, s, to.arrays<C>());
}

// The MLP's parameters, held, and folded.
template <class C>
struct FoldedParameters {
  MlpParameters<C> parameters;
  Folded<C> folded;

  FoldedParameters(const MlpTensors& m, const Optional& running, const Sizes& s)
      : parameters(Place(), m, running, s.N, s.H), folded(parameters, s) {}
};

}  // namespace
