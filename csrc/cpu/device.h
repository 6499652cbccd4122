// The CPU as the ops see it: its kernels, their memory, and tasks spread over PyTorch's threads.
#pragma once

#include <atomic>
#include <exception>

#include "cpu/kernel_table.h"
#include "engine/serial_block.h"
#include "ops/sums.h"

namespace kernelmeta::cpu {

// How a device runs each op: constructed from the device and the op's arguments, with `forward`, `backward`
// and, where there is a training op, `training`.
template <class Arguments>
class Kernel;

class Device {
 public:
  template <class Arguments>
  using Kernel = cpu::Kernel<Arguments>;

  explicit Device(const Tensor&) {}

  // Features of any storage are read as they are.
  template <class C, class Features>
  const Features& readable(const Features& features) const {
    return features;
  }

  template <class C, class Logits>
  const Logits& readable_logits(const Logits& logits) const {
    return logits;
  }
};

template <class C>
const Kernels<C>& kernels() {
  return kernel_table().of<C>();
}

// f(begin, end) over ranges of 0 .. n, on PyTorch's threads; what one of them throws is thrown here. (Through
// PyTorch's C functions it would come out as a line of theirs.)
template <class F>
void parallel(int64_t n, int64_t grain, F f) {
  std::atomic_flag failed;
  std::exception_ptr error;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// How many items a thread must get before a second one is worth waking: some 20 us of work.
inline int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, 1'000'000 / std::max<int64_t>(work_per_item, 1));
}

// f(begin, end) over ranges of tasks that take `work` multiplications each, roughly.
template <class F>
void over_tasks(int64_t T, int64_t work, F f) {
  parallel(T, grain(work), f);
}

// Tasks split into chunks of about the same work: chunk c is bounds[c] .. bounds[c + 1]. They depend on the
// tasks alone, so that sums over chunks, added in order, have the same bits for any number of threads.
class TaskChunks {
 public:
  TaskChunks() = default;
  // work: multiplications of each task, roughly.
  explicit TaskChunks(const std::vector<int64_t>& work) {
    const int64_t T = int64_t(work.size());
    const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(T, 32));
    for (const int64_t w : work) work_ += w;
    int64_t t = 0, done = 0;
    for (int64_t c = 1; c < chunks; ++c) {
      for (; t < T && done * chunks < work_ * c; ++t) done += work[size_t(t)];
      bounds_.push_back(t);
    }
    bounds_.push_back(T);
  }
  TaskChunks(int64_t T, int64_t work) : TaskChunks(std::vector<int64_t>(size_t(T), work)) {}

  // f(begin, end) over ranges of tasks; `factor` times their work is what a call costs.
  template <class F>
  void each(int64_t factor, F f) const {
    parallel(count(), grain(factor * work_ / count()),
             [&](int64_t begin, int64_t end) { f(bounds_[size_t(begin)], bounds_[size_t(end)]); });
  }

  // f(grad, begin, end) adds the sums over the tasks of a chunk to `grad`; their totals go to where `sums`
  // says. args: what a Grad is constructed from, after the arena.
  template <class C, class Grad, class F, class... Args>
  void sum(int64_t factor, const Sums<C, Grad>& sums, F f, const Args&... args) const {
    const int64_t n = count(), size = sums.size();
    const std::unique_ptr<C[]> partial = allocate<C>(size * n);
    std::fill(partial.get(), partial.get() + size * n, C(0));
    parallel(n, grain(factor * work_ / n), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Arena<C> arena(partial.get() + c * size);
        f(Grad(arena, args...), bounds_[size_t(c)], bounds_[size_t(c + 1)]);
      }
    });
    C* total = partial.get();
    for (int64_t c = 1; c < n; ++c) {
      for (int64_t i = 0; i < size; ++i) total[i] += total[c * size + i];
    }
    for (int i = 0; i < sums.parts().count; ++i) {
      const auto& part = sums.parts().parts[i];
      std::copy(total + part.offset, total + part.offset + part.size, part.to);
    }
    if (!sums.unfolds()) return;
    SerialBlock<C> block;
    Arena<C> arena(total + sums.mlp_offset());
    unfold(block, sums.mlp(), FoldedMlpGrad<C>(arena, sums.sizes()), sums.sizes(), sums.mlp_to());
  }

 private:
  std::vector<int64_t> bounds_{0};
  int64_t work_ = 0;

  int64_t count() const { return int64_t(bounds_.size()) - 1; }
};

// The MLP with gain and shift folded in, once a call.
template <class C>
class Folded {
 public:
  Folded() = default;
  Folded(const MlpParameters<C>& p, const Sizes& s)
      : memory_(allocate<C>(size_of<FoldedMlp<C>, C>(s, p.running() != nullptr))) {
    Arena<C> arena(memory_.get());
    mlp_ = FoldedMlp<C>(arena, s, p.running() != nullptr);
    SerialBlock<C> block;
    fold(block, p.arrays(), p.running(), s, mlp_);
  }
  operator const FoldedMlp<C>&() const { return mlp_; }

 private:
  std::unique_ptr<C[]> memory_;
  FoldedMlp<C> mlp_{};
};

// Multiplications that the MLP takes on the query rows of one task, forward.
inline int64_t mlp_work(const Sizes& s) { return s.Q * s.H * (2 * s.N + s.H); }

}  // namespace kernelmeta::cpu
