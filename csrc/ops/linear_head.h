// The tensor side of `linear_head`, `linear_head_backward` and `linear_head_gradients`, once for all devices.
// How a device runs them: cpu/linear_head.h, cuda/linear_head.h.
#pragma once

#include "engine/training.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct HeadParameters {
  Reader& in;
  Tensor weight = in.take<Tensor>("weight"), bias = in.take<Tensor>("bias"), rates = in.take<Tensor>("rates");
  int64_t oracle = in.take<int64_t>("oracle");
  bool first_order = in.take<bool>("first_order");
};

struct HeadCall {
  Reader& in;
  RowTensors features{in};
  HeadParameters parameters{in};
  bool return_weights = in.take<bool>("return_weights");
};

struct HeadForwardCall {
  Reader& in;
  HeadCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct HeadBackwardCall {
  Reader& in;
  Tensor grad_logits = in.take<Tensor>("grad_logits");
  OptionalTensor grad_heads = in.take<OptionalTensor>("grad_heads");
  Tensor trace = in.take<Tensor>("trace");
  HeadCall of{in};
  bool need_support = in.take<bool>("need_support"), need_query = in.take<bool>("need_query");
};

struct HeadGradientsCall {
  Reader& in;
  RowTensors features{in};
  Tensor query_labels = in.take<Tensor>("query_labels");
  HeadParameters parameters{in};
};

// Checked, and as the kernels read them.
template <class C>
struct HeadArguments {
  TensorDevice on;
  TaskFeatures support, query;
  Sizes s;
  Labels labels;
  Parameter<C> weight, bias, rates;
  HeadProblem<C> problem;

  HeadArguments(const RowTensors& f, const HeadParameters& p)
      : on(f.query),
        support(on, f.support, f.support_index, "support"),
        query(on, f.query, f.query_index, "query"),
        s(even_sizes(support, query, p.weight.dim() == 2 ? p.weight.size(0) : 0, 0, p.rates.numel())),
        labels(on, f.support_labels, s.T, s.S, "support_labels", s.N),
        weight(on, p.weight, {s.N, s.D}, "weight"),
        bias(on, p.bias, {s.N}, "bias"),
        rates(on, p.rates, {s.K}, "rates") {
    require(s.S >= 1, "support rows: at least one");
    require(p.oracle >= 0 && p.oracle <= 2, "oracle: 0 (cross entropy), 1 (squared error) or 2 (hinge)");
    Elements()
        .add({s.T + 1, s.K + 1, 3, s.N, padded(s.S)})
        .add({s.T + 1, s.S, padded(s.S)})
        .add({s.T + 1, s.N, s.D + 16});
    require_storage<C>({&support, &query});
    problem = {s,
               support.features(),
               query.features(),
               labels.get(),
               weight,
               bias,
               rates,
               static_cast<Oracle>(p.oracle),
               p.first_order};
  }
  HeadArguments(const HeadArguments&) = delete;

  int64_t trace_elements() const { return s.T * head_trace_size<C>(s); }
};

// The gradients of the parameters, as sums over tasks.
template <class C>
struct HeadParameterGradients {
  Tensor weight, bias, rates;

  explicit HeadParameterGradients(const HeadArguments<C>& a)
      : weight(empty<C>(a.on, {a.s.N, a.s.D})),
        bias(empty<C>(a.on, {a.s.N})),
        rates(empty<C>(a.on, {a.s.K})) {}

  template <class AllSums>
  void send(AllSums& sums, const HeadParameterGrad<C>& grad) const {
    sums.send(grad.weight, weight);
    sums.send(grad.bias, bias);
    sums.send(grad.rates, rates);
  }
};

struct HeadOp {
  static constexpr const char* name = "linear_head";
  static constexpr size_t results = 3;  // logits, heads, trace
  using Call = HeadForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters.weight, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.features.query);
      const HeadArguments<C> a(device.template readable<C>(call.of.features), call.of.parameters);
      const typename Device::template Kernel<HeadArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      const bool return_weights = call.of.return_weights;
      const Tensor logits = empty<C>(a.on, {s.T, s.Q, s.N});
      const Tensor heads = empty_if<C>(return_weights, a.on, {s.T, s.N, s.D + 1});
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {a.trace_elements()});
      kernel.forward({a.problem, data<C>(logits), data_if<C>(return_weights, heads),
                      data_if<C>(call.save_trace, trace)});
      return Tensors<results>{logits, heads, trace};
    });
  }
};

struct HeadBackwardOp {
  static constexpr const char* name = "linear_head_backward";
  static constexpr size_t results = 5;  // of support, query, weight, bias, rates
  using Call = HeadBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters.weight, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.features.query);
      const HeadArguments<C> a(device.template readable<C>(call.of.features), call.of.parameters);
      const typename Device::template Kernel<HeadArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      const Parameter<C> grad_logits(a.on, call.grad_logits, {s.T, s.Q, s.N}, "grad_logits");
      const Parameter<C> grad_heads(a.on, call.grad_heads, {s.T, s.N, s.D + 1}, "grad_heads");
      const Parameter<C> trace(a.on, call.trace, {a.trace_elements()}, "trace");
      const Tensor support = empty_if<C>(call.need_support, a.on, {s.T, s.S, s.D});
      const Tensor query = empty_if<C>(call.need_query, a.on, {s.T, s.Q, s.D});
      const HeadParameterGradients<C> of(a);
      Sums<C, HeadParameterGrad<C>> sums(s);
      of.send(sums, sums.grad);
      kernel.backward({a.problem, trace, grad_logits, grad_heads, data_if<C>(call.need_support, support),
                       data_if<C>(call.need_query, query)},
                      sums);
      return Tensors<results>{support, query, of.weight, of.bias, of.rates};
    });
  }
};

struct HeadGradientsOp {
  static constexpr const char* name = "linear_head_gradients";
  static constexpr size_t results = 5;  // measures [2], logits, and of weight, bias, rates
  using Call = HeadGradientsCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.parameters.weight, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.features.query);
      const HeadArguments<C> a(device.template readable<C>(call.features), call.parameters);
      const typename Device::template Kernel<HeadArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      const Labels labels(a.on, call.query_labels, s.T, s.Q, "query_labels", s.N);
      const Tensor measures = empty<C>(a.on, {2}), logits = empty<C>(a.on, {s.T, s.Q, s.N});
      const HeadParameterGradients<C> of(a);
      Sums<C, TrainingSums<C, HeadParameterGrad<C>>> sums(s);
      of.send(sums, sums.grad.grad);
      sums.send(sums.grad.measures, measures);
      kernel.training({{a.problem, data<C>(logits), nullptr, nullptr}, labels.get(), C(1) / C(s.T * s.Q)},
                      data<C>(measures), sums);
      return Tensors<results>{measures, logits, of.weight, of.bias, of.rates};
    });
  }
};

}  // namespace kernelmeta
