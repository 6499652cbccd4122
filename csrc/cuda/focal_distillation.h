// `focal_distillation` on a GPU; the kernels are in focal_distillation.cu.
#pragma once

#include "cuda/device.h"
#include "ops/focal_distillation.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<DistillationArguments<C>> {
 public:
  Kernel(const Device& device, const DistillationArguments<C>& a) : device_(device), problem_(a.problem) {}

  void forward(const DistillationForward<C>& f) const {
    const Plan plan = plan_focal_distillation(problem_, false, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_focal_distillation_forward<C>(f, plan, memory, device_.stream());
  }

  void backward(const DistillationBackward<C>& f) const {
    const Plan plan = plan_focal_distillation(problem_, true, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_focal_distillation_backward<C>(f, plan, memory, device_.stream());
  }

 private:
  const Device& device_;
  const DistillationProblem<C>& problem_;
};

}  // namespace kernelmeta::cuda
