// `synthetic_gradient_mlp` on a CPU.
#pragma once

#include "cpu/device.h"
#include "ops/synthetic_gradient_mlp.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<MlpArguments<C>> {
 public:
  Kernel(const Device&, const MlpArguments<C>& a) : a_(a), mlp_(a.mlp, a.s) {}

  void forward(C* gradients) const {
    over_tasks(a_.s.T, mlp_work(a_.s), [&](int64_t begin, int64_t end) {
      kernels<C>().mlp_forward(a_.problem, mlp_, gradients, begin, end);
    });
  }

  void backward(const C* grad, C* grad_logits, const Sums<C, FoldedMlpGrad<C>>& sums) const {
    TaskChunks(a_.s.T, mlp_work(a_.s))
        .sum(
            3, sums,
            [&](const FoldedMlpGrad<C>& of_mlp, int64_t begin, int64_t end) {
              kernels<C>().mlp_backward(a_.problem, mlp_, grad, grad_logits, of_mlp, begin, end);
            },
            a_.s);
  }

 private:
  const MlpArguments<C>& a_;
  Folded<C> mlp_;
};

}  // namespace kernelmeta::cpu
