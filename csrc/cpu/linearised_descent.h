// `linearised_descent` on a CPU.
#pragma once

#include "cpu/device.h"
#include "ops/linearised_descent.h"

namespace kernelmeta::cpu {

template <class C>
class Kernel<DescentArguments<C>> {
 public:
  Kernel(const Device&, const DescentArguments<C>& a) : net_(a.net), chunks_(a.problem.T, work(a.problem)) {}

  void forward(const DescentForward<C>& run) const {
    chunks_.each(
        1, [&](int64_t begin, int64_t end) { kernels<C>().linearised_descent_forward(run, begin, end); });
  }

  void backward(const DescentBackward<C>& run, const Sums<C, DescentGrad<C>>& sums) const {
    chunks_.sum(
        2, sums,
        [&](const DescentGrad<C>& grad, int64_t begin, int64_t end) {
          kernels<C>().linearised_descent_backward(run, grad, begin, end);
        },
        net_);
  }

 private:
  const Perceptron& net_;
  TaskChunks chunks_;

  static int64_t work(const DescentProblem<C>& p) {
    const int64_t R = p.net.outputs() * p.S;
    int64_t total = p.steps * R * (R + 20);
    for (int l = 0; l < p.net.layers; ++l) {
      const int64_t in = p.net.widths[l], out = p.net.widths[l + 1];
      total += (p.S + p.Q) * in * out + p.S * (p.S + p.Q) * (in + out);
      if (l + 1 < p.net.layers) total += R * out * R;
      if (l > 0) total += p.Q * in * out + (l + 1 < p.net.layers ? R * in * out : 0);
    }
    return total;
  }
};

}  // namespace kernelmeta::cpu
