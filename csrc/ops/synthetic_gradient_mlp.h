// The tensor side of `synthetic_gradient_mlp` and its backward, once for all devices. How a device runs them:
// cpu/synthetic_gradient_mlp.h, cuda/synthetic_gradient_mlp.h.
#pragma once

#include "ops/sums.h"

namespace kernelmeta {

struct MlpCall {
  Reader& in;
  Tensor logits = in.take<Tensor>("logits");
  MlpTensors<Tensor> mlp{in};
  OptionalTensor running_stats = in.take<OptionalTensor>("running_stats");
};

struct MlpBackwardCall {
  Reader& in;
  Tensor grad_gradients = in.take<Tensor>("grad_gradients");
  MlpCall of{in};
};

// Checked, and as the kernels read them.
template <class C>
struct MlpArguments {
  TensorDevice on;
  Sizes s;
  MlpParameters<C> mlp;
  Parameter<C> logits;
  MlpProblem<C> problem;

  explicit MlpArguments(const MlpCall& call)
      : on(call.logits),
        s(sizes(call)),
        mlp(on, call.mlp, call.running_stats, s),
        logits(on, call.logits, {s.T, s.Q, s.N}, "logits"),
        problem{s, mlp.arrays(), mlp.running(), logits} {}

 private:
  static Sizes sizes(const MlpCall& call) {
    require(call.logits.dim() == 3 && call.logits.size(1) >= 1,
            "logits must be [T, Q, N], at least one row each");
    const MlpSizes mlp(call.mlp.weight1);
    return {call.logits.size(0), 0, call.logits.size(1), mlp.N, 0, mlp.H, 0};
  }
};

struct MlpOp {
  static constexpr const char* name = "synthetic_gradient_mlp";
  static constexpr size_t results = 1;
  using Call = MlpCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.mlp.weight1, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.logits);
      const MlpArguments<C> a(call);
      const typename Device::template Kernel<MlpArguments<C>> kernel(device, a);
      const Tensor gradients = empty<C>(a.on, {a.s.T, a.s.Q, a.s.N});
      kernel.forward(data<C>(gradients));
      return Tensors<results>{gradients};
    });
  }
};

struct MlpBackwardOp {
  static constexpr const char* name = "synthetic_gradient_mlp_backward";
  static constexpr size_t results = 11;  // of the logits and the MLP's ten
  using Call = MlpBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.mlp.weight1, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.logits);
      const MlpArguments<C> a(call.of);
      const typename Device::template Kernel<MlpArguments<C>> kernel(device, a);
      const Parameter<C> grad(a.on, call.grad_gradients, {a.s.T, a.s.Q, a.s.N}, "grad_gradients");
      const Tensor logits = empty<C>(a.on, {a.s.T, a.s.Q, a.s.N});
      const MlpGradients<C> m(a.on, true, a.s);
      Sums<C, FoldedMlpGrad<C>> sums(a.s);
      sums.unfold(sums.grad, a.s, a.mlp, m);
      kernel.backward(grad, data<C>(logits), sums);
      return Tensors<results>{logits,  m.weight1, m.bias1,  m.gain1,   m.shift1, m.weight2,
                              m.bias2, m.gain2,   m.shift2, m.weight3, m.bias3};
    });
  }
};

}  // namespace kernelmeta
