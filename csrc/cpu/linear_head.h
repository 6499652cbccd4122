// `linear_head` on a CPU.
#pragma once

#include "cpu/device.h"
#include "ops/linear_head.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<HeadArguments<C>> {
 public:
  Kernel(const Device&, const HeadArguments<C>& a)
      : s_(a.s),
        work_(s_.D * (s_.S * s_.S / 2 + (2 * s_.S + s_.Q) * s_.N) + s_.K * s_.N * s_.S * (s_.S + 20)) {}

  void forward(const HeadForward<C>& run) const {
    over_tasks(s_.T, work_,
               [&](int64_t begin, int64_t end) { kernels<C>().linear_head_forward(run, begin, end); });
  }

  void backward(const HeadBackward<C>& run, const Sums<C, HeadParameterGrad<C>>& sums) const {
    TaskChunks(s_.T, work_)
        .sum(
            2, sums,
            [&](const HeadParameterGrad<C>& grad, int64_t begin, int64_t end) {
              kernels<C>().linear_head_backward(run, grad, begin, end);
            },
            s_);
  }

  // measures [2]: the mean loss, and the share of rows that are right.
  void training(const HeadTraining<C>& run, C* measures,
                const Sums<C, typename HeadTraining<C>::Sums>& sums) const {
    TaskChunks(s_.T, work_)
        .sum(
            3, sums,
            [&](const typename HeadTraining<C>::Sums& chunk, int64_t begin, int64_t end) {
              kernels<C>().linear_head_training(run, chunk, begin, end);
            },
            s_);
    for (int i = 0; i < 2; ++i) measures[i] *= run.share;
  }

 private:
  const Sizes& s_;
  int64_t work_;
};

}  // namespace kernelmeta::cpu
