// `class_means` on a CPU.
#pragma once

#include "cpu/class_lists.h"
#include "cpu/device.h"
#include "ops/class_means.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<ClassMeansArguments<C>> {
 public:
  Kernel(const Device&, const ClassMeansArguments<C>& a)
      : problem_(a.problem),
        classes_(a.labels.get(), a.s.T, a.s.S, a.s.N),
        work_((2 * a.s.S + a.s.N) * a.s.D) {
    problem_.classes = classes_.table();
  }

  void forward(C* theta0) const {
    over_tasks(problem_.s.T, work_, [&](int64_t begin, int64_t end) {
      kernels<C>().class_means_forward(problem_, theta0, begin, end);
    });
  }

  // grad_support: null where not wanted.
  void backward(const C* grad, C* grad_support, const Sums<C, WeightGrad<C>>& sums) const {
    const bool weighted = problem_.weight != nullptr;
    TaskChunks(problem_.s.T, work_)
        .sum(
            2, sums,
            [&](const WeightGrad<C>& of, int64_t begin, int64_t end) {
              kernels<C>().class_means_backward(problem_, grad, grad_support, weighted ? of.weight : nullptr,
                                                begin, end);
            },
            weighted ? problem_.s.D : 0);
  }

 private:
  ClassMeansProblem<C> problem_;
  ClassLists classes_;
  int64_t work_;
};

}  // namespace kernelmeta::cpu
