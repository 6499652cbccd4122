// `focal_distillation` on a CPU.
#pragma once

#include "cpu/device.h"
#include "ops/focal_distillation.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<DistillationArguments<C>> {
 public:
  Kernel(const Device&, const DistillationArguments<C>& a) : problem_(a.problem) {}

  void forward(const DistillationForward<C>& f) const {
    over_tasks(problem_.R, kWork * problem_.N,
               [&](int64_t begin, int64_t end) { kernels<C>().focal_distillation_forward(f, begin, end); });
  }

  void backward(const DistillationBackward<C>& f) const {
    over_tasks(problem_.R, kWork * problem_.N,
               [&](int64_t begin, int64_t end) { kernels<C>().focal_distillation_backward(f, begin, end); });
  }

 private:
  // Multiplications that an element takes, roughly.
  static constexpr int64_t kWork = 40;

  const DistillationProblem<C>& problem_;
};

}  // namespace kernelmeta::cpu
