// `ridge` on a GPU; the kernels are in ridge.cu. A task whose system is singular gives NaN.
#pragma once

#include "cuda/device.h"
#include "ops/ridge.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<RidgeArguments<C>> {
 public:
  Kernel(const Device& device, const RidgeArguments<C>& a)
      : device_(device), host_(a.on_host()), tasks_(tasks_of_each_size(a.support, a.query, a.labels)) {
    for (const int64_t t : tasks_) stride_ = std::max(stride_, ridge_trace_size<C>(host_.sizes(t)));
  }

  int64_t trace_elements() const { return host_.T * stride_; }

  void forward(const RidgeForward<C>& run) const {
    RidgeForward<C> on_host = run;
    on_host.problem = host_;
    const Plan plan = plan_ridge_forward<C>(on_host, stride_, tasks_, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_ridge_forward<C>(run, stride_, plan, memory, device_.stream());
  }

  void backward(const RidgeBackward<C>& run, const Sums<C, RidgeGrad<C>>& sums) const {
    RidgeBackward<C> on_host = run;
    on_host.problem = host_;
    const Plan plan = plan_ridge_backward<C>(on_host, stride_, tasks_, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_ridge_backward<C>(run, stride_, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
  RidgeProblem<C> host_;
  std::vector<int64_t> tasks_;  // one of each size, or of the largest
  int64_t stride_ = 0;          // from one task's trace to the next one's
};

}  // namespace kernelmeta::cuda
