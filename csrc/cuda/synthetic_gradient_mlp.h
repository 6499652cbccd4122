// `synthetic_gradient_mlp` on a GPU; the kernels are in mlp.cu.
#pragma once

#include "cuda/device.h"
#include "ops/synthetic_gradient_mlp.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<MlpArguments<C>> {
 public:
  Kernel(const Device& device, const MlpArguments<C>& a) : device_(device), problem_(a.problem) {}

  void forward(C* gradients) const {
    const Plan plan = plan_mlp(problem_, false, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_mlp_forward<C>(problem_, gradients, plan, memory, device_.stream());
  }

  void backward(const C* grad, C* grad_logits, const Sums<C, FoldedMlpGrad<C>>& sums) const {
    const Plan plan = plan_mlp(problem_, true, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_mlp_backward<C>(problem_, grad, grad_logits, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
  const MlpProblem<C>& problem_;
};

}  // namespace kernelmeta::cuda
