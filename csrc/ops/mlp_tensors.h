// The synthetic-gradient MLP's ten tensors: as a call names them, as kernels read them, and their gradients.
#pragma once

#include "ops/tensors.h"

namespace kernelmeta {

// T: Tensor, or OptionalTensor where an op has the MLP or not.
template <class T>
struct MlpTensors {
  Reader& in;
  T weight1 = in.take<T>("weight1"), bias1 = in.take<T>("bias1");
  T gain1 = in.take<T>("gain1"), shift1 = in.take<T>("shift1");
  T weight2 = in.take<T>("weight2"), bias2 = in.take<T>("bias2");
  T gain2 = in.take<T>("gain2"), shift2 = in.take<T>("shift2");
  T weight3 = in.take<T>("weight3"), bias3 = in.take<T>("bias3");
};

// What weight1 [H, N] says: the hidden units, and the ways that the MLP is made for.
struct MlpSizes {
  int64_t H, N;

  explicit MlpSizes(const Tensor& weight1) {
    require(weight1.dim() == 2 && weight1.numel() > 0,
            "weight1 must be [H, N], hidden units and ways: at least one");
    H = weight1.size(0);
    N = weight1.size(1);
  }
};

// The parameters, held; null pointers where there is no MLP. s: its N inputs and its outputs. running: [2, 2,
// H] or none.
template <class C>
class MlpParameters {
 public:
  const int64_t H;

  template <class T>
  MlpParameters(const TensorDevice& on, const MlpTensors<T>& m, const OptionalTensor& running, const Sizes& s)
      : H(hidden_units(m.weight1)),
        weight1_(on, m.weight1, {H, s.N}, "weight1"),
        bias1_(on, m.bias1, {H}, "bias1"),
        gain1_(on, m.gain1, {H}, "gain1"),
        shift1_(on, m.shift1, {H}, "shift1"),
        weight2_(on, m.weight2, {H, H}, "weight2"),
        bias2_(on, m.bias2, {H}, "bias2"),
        gain2_(on, m.gain2, {H}, "gain2"),
        shift2_(on, m.shift2, {H}, "shift2"),
        weight3_(on, m.weight3, {s.outputs(), H}, "weight3"),
        bias3_(on, m.bias3, {s.outputs()}, "bias3") {
    if (!given()) return;
    const MlpArrays<const C> all = arrays();
    require(all.bias1 && all.gain1 && all.shift1 && all.weight2 && all.bias2 && all.gain2 && all.shift2 &&
                all.weight3 && all.bias3,
            "mlp: all ten tensors or none");
    running_ = Parameter<C>(on, running, {2, 2, H}, "running_stats");
  }

  bool given() const { return weight1_.get() != nullptr; }
  MlpArrays<const C> arrays() const {
    return {weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_};
  }
  const C* running() const { return running_.get(); }

 private:
  Parameter<C> weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_,
      running_;

  static int64_t hidden_units(const OptionalTensor& weight1) { return weight1 ? MlpSizes(*weight1).H : 0; }
};

template <class C>
struct MlpGradients {
  Tensor weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3;

  MlpGradients(const TensorDevice& on, bool wanted, const Sizes& s)
      : weight1(empty_if<C>(wanted, on, {s.H, s.N})),
        bias1(empty_if<C>(wanted, on, {s.H})),
        gain1(empty_if<C>(wanted, on, {s.H})),
        shift1(empty_if<C>(wanted, on, {s.H})),
        weight2(empty_if<C>(wanted, on, {s.H, s.H})),
        bias2(empty_if<C>(wanted, on, {s.H})),
        gain2(empty_if<C>(wanted, on, {s.H})),
        shift2(empty_if<C>(wanted, on, {s.H})),
        weight3(empty_if<C>(wanted, on, {s.outputs(), s.H})),
        bias3(empty_if<C>(wanted, on, {s.outputs()})) {}

  MlpArrays<C> arrays() const {
    return {data<C>(weight1), data<C>(bias1), data<C>(gain1),  data<C>(shift1),  data<C>(weight2),
            data<C>(bias2),   data<C>(gain2), data<C>(shift2), data<C>(weight3), data<C>(bias3)};
  }
};

}  // namespace kernelmeta
