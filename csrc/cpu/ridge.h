// `ridge` on a CPU.
#pragma once

#include "cpu/class_lists.h"
#include "cpu/device.h"
#include "ops/ridge.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<RidgeArguments<C>> {
 public:
  Kernel(const Device&, const RidgeArguments<C>& a)
      : T_(a.problem.T), classes_(a.labels, a.support, a.problem.N) {
    const RidgeProblem<C> host = a.on_host();
    std::vector<int64_t> work;
    for (int64_t t = 0; t < T_; ++t) {
      const Sizes s = host.sizes(t);
      trace_offsets_.push_back(trace_offsets_.back() + ridge_trace_size<C>(s));
      work.push_back(s.S * (s.S / 2 + s.Q) * s.D + s.S * s.S * s.S / 3 + s.S * s.N * (s.S + s.Q));
    }
    chunks_ = TaskChunks(work);
  }

  int64_t trace_elements() const { return trace_offsets_.back(); }

  // Refuses a system that is singular.
  void forward(RidgeForward<C> run) const {
    run.problem.classes.table = classes_.table();
    const std::unique_ptr<bool[]> singular = allocate<bool>(T_);
    chunks_.each(1, [&](int64_t begin, int64_t end) {
      kernels<C>().ridge_forward(run, trace_offsets_.data(), singular.get(), begin, end);
    });
    for (int64_t t = 0; t < T_; ++t) {
      if (!singular[size_t(t)]) continue;
      refuse(
          "ridge: the system of task " + std::to_string(t) +
          " is singular; a larger regularization, or fewer support rows that repeat each other, would help");
    }
  }

  void backward(RidgeBackward<C> run, const Sums<C, RidgeGrad<C>>& sums) const {
    run.problem.classes.table = classes_.table();
    chunks_.sum(2, sums, [&](const RidgeGrad<C>& grad, int64_t begin, int64_t end) {
      kernels<C>().ridge_backward(run, trace_offsets_.data(), grad, begin, end);
    });
  }

 private:
  int64_t T_;
  ClassLists classes_;
  std::vector<int64_t> trace_offsets_{0};  // where each task's trace begins
  TaskChunks chunks_;
};

}  // namespace kernelmeta::cpu
