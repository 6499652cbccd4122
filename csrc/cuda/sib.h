// `sib` on a GPU; the kernels are in sib_forward.cu and sib_backward.cu.
#pragma once

#include "cuda/device.h"
#include "ops/sib.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<SibArguments<C>> {
 public:
  Kernel(const Device& device, const SibArguments<C>& a) : device_(device), s_(a.s) {}

  // stats: [K][2][2][H], the average over the tasks, or null.
  void forward(SibForward<C> run, C* stats) const {
    const int64_t size = s_.K * 4 * s_.H;
    const Scratch<C> of_tasks(device_, stats ? s_.T * size : 0);
    if (stats) run.stats = of_tasks;
    const Plan plan = plan_sib_forward(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_sib_forward<C>(run, plan, memory, device_.stream());
    if (stats) launch_sum_partials<C>(of_tasks, s_.T, size, C(1) / C(s_.T), {stats, size}, device_.stream());
  }

  void backward(const SibBackward<C>& run, const Sums<C, SibParameterGrad<C>>& sums) const {
    const Plan plan = plan_sib_backward(run, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_sib_backward<C>(run, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
  const Sizes& s_;
};

}  // namespace kernelmeta::cuda
