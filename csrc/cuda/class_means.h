// `class_means` on a GPU; the kernels are in class_means.cu.
#pragma once

#include "cuda/device.h"
#include "ops/class_means.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<ClassMeansArguments<C>> {
 public:
  Kernel(const Device& device, const ClassMeansArguments<C>& a) : device_(device), problem_(a.problem) {}

  void forward(C* theta0) const {
    const Plan plan = plan_class_means(problem_, false, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_class_means_forward<C>(problem_, theta0, plan, memory, device_.stream());
  }

  // grad_support: null where not wanted.
  void backward(const C* grad, C* grad_support, const Sums<C, WeightGrad<C>>& sums) const {
    const Plan plan = plan_class_means(problem_, true, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, problem_.weight ? problem_.s.D : 0);
    launch_class_means_backward<C>(problem_, grad, grad_support, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
  const ClassMeansProblem<C>& problem_;
};

}  // namespace kernelmeta::cuda
