// `linear_head` on a GPU; the kernels are in linear_head.cu.
#pragma once

#include "cuda/device.h"
#include "ops/linear_head.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<HeadArguments<C>> {
 public:
  Kernel(const Device& device, const HeadArguments<C>&) : device_(device) {}

  void forward(const HeadForward<C>& run) const {
    const Plan plan = plan_linear_head_forward(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_linear_head_forward<C>(run, plan, memory, device_.stream());
  }

  void backward(const HeadBackward<C>& run, const Sums<C, HeadParameterGrad<C>>& sums) const {
    const Plan plan = plan_linear_head_backward(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_linear_head_backward<C>(run, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
};

}  // namespace kernelmeta::cuda
