// `sib` on a CPU.
#pragma once

#include "cpu/class_lists.h"
#include "cpu/device.h"
#include "ops/sib.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<SibArguments<C>> {
 public:
  Kernel(const Device&, const SibArguments<C>& a)
      : s_(a.s),
        mlp_(a.mlp, a.s),
        work_(s_.Q * s_.D * std::min(s_.Q / 2, 4 * s_.K * s_.N) + s_.Q * s_.N * s_.D +
              s_.K * (mlp_work(s_) + s_.Q * s_.Q * s_.N)) {
    if (a.labels) classes_.emplace(a.labels->get(), s_.T, s_.S, s_.N);
  }

  // stats: [K][2][2][H], the average over the tasks, or null.
  void forward(SibForward<C> run, C* stats) const {
    sort_classes(run.problem);
    const auto of_tasks = task_stats(run, stats);
    over_tasks(s_.T, work_,
               [&](int64_t begin, int64_t end) { kernels<C>().sib_forward(run, mlp_, begin, end); });
    average(run.stats, stats);
  }

  void backward(SibBackward<C> run, const Sums<C, SibParameterGrad<C>>& sums) const {
    sort_classes(run.problem);
    TaskChunks(s_.T, work_)
        .sum(
            2, sums,
            [&](const SibParameterGrad<C>& grad, int64_t begin, int64_t end) {
              kernels<C>().sib_backward(run, mlp_, grad, begin, end);
            },
            s_);
  }

  // measures [2]: the mean loss, and the share of rows that are right.
  void training(SibTraining<C> run, C* stats, C* measures,
                const Sums<C, typename SibTraining<C>::Sums>& sums) const {
    sort_classes(run.forward.problem);
    const auto of_tasks = task_stats(run.forward, stats);
    TaskChunks(s_.T, work_)
        .sum(
            3, sums,
            [&](const typename SibTraining<C>::Sums& chunk, int64_t begin, int64_t end) {
              kernels<C>().sib_training(run, mlp_, chunk, begin, end);
            },
            s_);
    for (int i = 0; i < 2; ++i) measures[i] *= run.share;
    average(run.forward.stats, stats);
  }

 private:
  const Sizes& s_;
  std::optional<ClassLists> classes_;
  Folded<C> mlp_;
  int64_t work_;

  void sort_classes(SibProblem<C>& problem) const {
    if (classes_) problem.classes = classes_->table();
  }

  int64_t stats_size() const { return s_.K * 4 * s_.H; }

  // Where the kernels leave the statistics of every task; memory of its own unless there is one task.
  std::unique_ptr<C[]> task_stats(SibForward<C>& run, C* stats) const {
    std::unique_ptr<C[]> memory;
    if (stats && s_.T > 1) memory = allocate<C>(s_.T * stats_size());
    run.stats = memory ? memory.get() : stats;
    return memory;
  }

  // In the order of the tasks.
  void average(const C* of_tasks, C* stats) const {
    if (!stats || s_.T == 1) return;
    for (int64_t i = 0; i < stats_size(); ++i) {
      C sum = 0;
      for (int64_t t = 0; t < s_.T; ++t) sum += of_tasks[t * stats_size() + i];
      stats[i] = sum / C(s_.T);
    }
  }
};

}  // namespace kernelmeta::cpu
