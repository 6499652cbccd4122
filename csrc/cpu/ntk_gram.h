// `ntk_gram` on a CPU.
#pragma once

#include "cpu/device.h"
#include "ops/ntk_gram.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<NtkArguments<C>> {
 public:
  Kernel(const Device&, const NtkArguments<C>& a) : net_(a.net), chunks_(a.problem.T, work(a.problem)) {}

  void forward(const NtkForward<C>& run) const {
    chunks_.each(1, [&](int64_t begin, int64_t end) { kernels<C>().ntk_gram_forward(run, begin, end); });
  }

  void backward(const NtkBackward<C>& run, const Sums<C, NtkGrad<C>>& sums) const {
    chunks_.sum(
        3, sums,
        [&](const NtkGrad<C>& grad, int64_t begin, int64_t end) {
          kernels<C>().ntk_gram_backward(run, grad, begin, end);
        },
        net_);
  }

 private:
  const Perceptron& net_;
  TaskChunks chunks_;

  static int64_t work(const NtkProblem<C>& p) {
    const int64_t rows = p.S + p.Q, N = p.net.outputs();
    int64_t total = 0;
    for (int l = 0; l < p.net.layers; ++l) {
      const int64_t in = p.net.widths[l], out = p.net.widths[l + 1];
      total += rows * in * out + p.S * rows * in;
      if (l + 1 < p.net.layers) total += p.S * rows * out * N * (p.full ? N : 1);
      if (l > 0 && l + 1 < p.net.layers) total += rows * N * in * out;
    }
    return total;
  }
};

}  // namespace kernelmeta::cpu
