// What every op on CUDA tensors needs between its arguments and its kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <memory>

#include "arguments.h"
#include "cuda/launch.h"

namespace {

using namespace kernelmeta::cuda;

// Makes the tensors' device the current one while an op runs.
class OnDevice {
 public:
  explicit OnDevice(const Place& on) : guard_(on.index), where_{on.index, nullptr} {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.index, &where_.stream));
  }
  operator const Where&() const { return where_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Where where_;
};

// Memory of a call, freed in the order of the stream.
template <class C>
class Scratch {
 public:
  Scratch(int64_t elements, const Place& on) : tensor_(empty({elements}, kType<C>, on)) {}
  operator C*() const { return data<C>(tensor_); }

 private:
  Tensor tensor_;
};

template <class C>
Scratch<C> workspace(const Plan& plan, const Place& on) {
  return {plan.blocks * plan.workspace, on};
}

// [blocks][size], or one zero partial where there is no block.
template <class C>
Tensor partial_sums(const Plan& plan, int64_t size, const Place& on) {
  Tensor sums = empty({std::max<int64_t>(plan.blocks, 1), size}, kType<C>, on);
  if (plan.blocks == 0) torch::stable::zero_(sums);
  return sums;
}

// The partials' sum, in order.
template <class C>
Tensor total(const Tensor& partials, const Where& where, const Place& on) {
  const int64_t count = partials.size(0), size = partials.size(1);
  if (count == 1) return partials;
  Tensor sum = empty({size}, kType<C>, on);
  launch_sum_partials<C>(data<C>(partials), count, size, C(1), {data<C>(sum), size}, where);
  return sum;
}

// Where the parts of a Grad, a struct that takes its arrays from an Arena, lie in it.
template <class Grad, class C>
class GradLayout {
 public:
  template <class... Args>
  explicit GradLayout(const Args&... args)
      : memory_(new C[size_t(size_of<Grad, C>(args...))]), arena_(memory_.get()), grad(arena_, args...) {}
  int64_t size() const { return arena_.used(); }
  int64_t offset(const C* part) const { return part - memory_.get(); }
  // out <- a part of the sum, which has as many elements.
  void add(Pieces<C>& to, const C* part, int64_t elements, C* out) const {
    to.add(offset(part), elements, out);
  }

 private:
  std::unique_ptr<C[]> memory_;
  Arena<C> arena_;

 public:
  Grad grad;
};

// The features as one kernel reads them: the query's type for the support too, the precision of the
// computation for theta0.
template <class C>
struct ReadableFeatures {
  Tensor query, start;

  ReadableFeatures(const Tensor& q, const Tensor& s, bool from_support) : query(q), start(s) {
    if (!from_support) {
      start = wide(start);
    } else if (query.scalar_type() != start.scalar_type()) {
      query = wide(query);
      start = wide(start);
    }
  }

 private:
  static Tensor wide(const Tensor& t) {
    return t.scalar_type() == kType<C> ? t : torch::stable::to(t, kType<C>);
  }
};

}  // namespace
