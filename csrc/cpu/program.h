// `program` on a CPU.
#pragma once

#include "cpu/class_lists.h"
#include "cpu/device.h"
#include "ops/program.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<ProgramArguments<C>> {
 public:
  Kernel(const Device&, const ProgramArguments<C>& a)
      : host_(a.on_host()),
        classes_(a.labels, a.support, host_.N),
        folded_(a.mlp.given() ? Folded<C>(a.mlp, a.mlp_sizes()) : Folded<C>()) {
    std::vector<int64_t> work;
    for (int64_t t = 0; t < host_.T; ++t) {
      const ProgramShape s = host_.shape(t, a.phases.data());
      trace_offsets_.push_back(trace_offsets_.back() + program_trace_size(host_, s));
      work.push_back(task_work(s));
    }
    chunks_ = TaskChunks(work);
    call_ = {a.phases.data(), folded_, trace_offsets_.data()};
  }

  int64_t trace_elements() const { return trace_offsets_.back(); }

  void forward(ProgramForward<C> run) const {
    run.problem.classes.table = classes_.table();
    chunks_.each(1,
                 [&](int64_t begin, int64_t end) { kernels<C>().program_forward(run, call_, begin, end); });
  }

  void backward(ProgramBackward<C> run, const Sums<C, ProgramGrad<C>>& sums) const {
    run.problem.classes.table = classes_.table();
    chunks_.sum(
        3, sums,
        [&](const ProgramGrad<C>& grad, int64_t begin, int64_t end) {
          kernels<C>().program_backward(run, call_, grad, begin, end);
        },
        host_);
  }

 private:
  ProgramProblem<C> host_;
  ClassLists classes_;
  Folded<C> folded_;
  std::vector<int64_t> trace_offsets_{0};  // where each task's trace begins
  TaskChunks chunks_;
  KernelCall<C> call_{};

  static int64_t task_work(const ProgramShape& s) {
    const int64_t live = s.support().count + s.Q;
    int64_t multiplications = s.N * live * s.D;
    if (s.uses_support) multiplications += s.S * (s.S / 2 + s.Q) * s.D;
    if (s.uses_query) multiplications += s.Q * s.Q / 2 * s.D;
    int64_t step = 0;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      const int64_t rows = s.part(phase.query).count;
      step += rows * s.N * (live + 20);
      const Sizes mlp = s.mlp(rows);
      if (phase.oracle == Oracle::kSyntheticGradient || phase.oracle == Oracle::kEquivariantGradient)
        step += mlp.Q * s.H * (mlp.N + mlp.outputs() + s.H);
      if (phase.joins) continue;
      multiplications += phase.steps * step;
      step = 0;
    }
    return multiplications;
  }
};

}  // namespace kernelmeta::cpu
