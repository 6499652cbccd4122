// `ntk_gram` on a GPU; the kernels are in ntk_gram.cu.
#pragma once

#include "cuda/device.h"
#include "ops/ntk_gram.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<NtkArguments<C>> {
 public:
  Kernel(const Device& device, const NtkArguments<C>&) : device_(device) {}

  void forward(const NtkForward<C>& run) const {
    const Plan plan = plan_ntk_gram_forward<C>(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_ntk_gram_forward<C>(run, plan, memory, device_.stream());
  }

  void backward(const NtkBackward<C>& run, const Sums<C, NtkGrad<C>>& sums) const {
    const Plan plan = plan_ntk_gram_backward<C>(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_ntk_gram_backward<C>(run, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
};

}  // namespace kernelmeta::cuda
