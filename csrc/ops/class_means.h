// The tensor side of `class_means` and its backward, once for all devices. How a device runs them:
// cpu/class_means.h, cuda/class_means.h.
#pragma once

#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct ClassMeansCall {
  Reader& in;
  Tensor support = in.take<Tensor>("support"), support_labels = in.take<Tensor>("support_labels");
  OptionalTensor weight = in.take<OptionalTensor>("weight");
  int64_t n_way = in.take<int64_t>("n_way");
};

struct ClassMeansBackwardCall {
  Reader& in;
  Tensor grad_theta0 = in.take<Tensor>("grad_theta0");
  ClassMeansCall of{in};
  bool need_support = in.take<bool>("need_support");
};

// Checked, and as the kernels read them.
template <class C>
struct ClassMeansArguments {
  TensorDevice on;
  TaskFeatures support;
  Sizes s;
  Labels labels;
  Parameter<C> weight;
  ClassMeansProblem<C> problem;

  explicit ClassMeansArguments(const ClassMeansCall& call)
      : on(call.support),
        support(on, call.support, std::nullopt, "support"),
        s{support.T(), support.rows(), 0, call.n_way, support.D(), 0, 0},
        labels(on, call.support_labels, s.T, s.S, "support_labels"),
        weight(on, call.weight, {s.D}, "weight") {
    require(s.N >= 1, "ways: at least one");
    Elements().add({s.T, s.N, s.D}).add({s.T, s.N});
    require_storage<C>({&support});
    problem = {s, support.features(), {labels.get(), nullptr, nullptr}, weight};
  }
  ClassMeansArguments(const ClassMeansArguments&) = delete;
};

// A sum over tasks.
template <class C>
struct WeightGrad {
  C* weight;  // [D]
  WeightGrad(Arena<C>& arena, int64_t D) : weight(arena.take(D)) {}
};

struct ClassMeansOp {
  static constexpr const char* name = "class_means";
  static constexpr size_t results = 1;
  using Call = ClassMeansCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    const auto run_in = [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.support);
      const ClassMeansArguments<C> a(call);
      const typename Device::template Kernel<ClassMeansArguments<C>> kernel(device, a);
      const Tensor theta0 = empty<C>(a.on, {a.s.T, a.s.N, a.s.D});
      kernel.forward(data<C>(theta0));
      return Tensors<results>{theta0};
    };
    return call.support.scalar_type() == ScalarType::Double ? run_in(double{}) : run_in(float{});
  }
};

struct ClassMeansBackwardOp {
  static constexpr const char* name = "class_means_backward";
  static constexpr size_t results = 2;  // of support and weight
  using Call = ClassMeansBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.grad_theta0, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.support);
      const ClassMeansArguments<C> a(call.of);
      const typename Device::template Kernel<ClassMeansArguments<C>> kernel(device, a);
      const bool weighted = a.weight.get() != nullptr;
      const Parameter<C> grad(a.on, call.grad_theta0, {a.s.T, a.s.N, a.s.D}, "grad_theta0");
      const Tensor support = empty_if<C>(call.need_support, a.on, {a.s.T, a.s.S, a.s.D});
      const Tensor weight = empty_if<C>(weighted, a.on, {a.s.D});
      Sums<C, WeightGrad<C>> sums(weighted ? a.s.D : 0);
      sums.send_if(weighted, sums.grad.weight, weight);
      kernel.backward(grad, data_if<C>(call.need_support, support), sums);
      return Tensors<results>{support, weight};
    });
  }
};

}  // namespace kernelmeta
