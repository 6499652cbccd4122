// `linearised_descent` on a GPU; the kernels are in linearised_descent.cu.
#pragma once

#include "cuda/device.h"
#include "ops/linearised_descent.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<DescentArguments<C>> {
 public:
  Kernel(const Device& device, const DescentArguments<C>&) : device_(device) {}

  void forward(const DescentForward<C>& run) const {
    const Plan plan = plan_linearised_descent_forward<C>(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_linearised_descent_forward<C>(run, plan, memory, device_.stream());
  }

  void backward(const DescentBackward<C>& run, const Sums<C, DescentGrad<C>>& sums) const {
    const Plan plan = plan_linearised_descent_backward<C>(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_linearised_descent_backward<C>(run, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
};

}  // namespace kernelmeta::cuda
