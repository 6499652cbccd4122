// The tensor side of `sib`, `sib_backward` and `sib_gradients`, once for all devices. How a device runs them:
// cpu/sib.h, cuda/sib.h.
#pragma once

#include "engine/training.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

// start: the support rows, or, without support_labels, theta0.
struct SibFeatures {
  Reader& in;
  Tensor start = in.take<Tensor>("start");
  OptionalTensor start_index = in.take<OptionalTensor>("start_index");
  Tensor query = in.take<Tensor>("query");
  OptionalTensor query_index = in.take<OptionalTensor>("query_index");
  OptionalTensor support_labels = in.take<OptionalTensor>("support_labels");
};

struct SibParameters {
  Reader& in;
  OptionalTensor weight = in.take<OptionalTensor>("weight");
  Tensor scale = in.take<Tensor>("scale"), bias = in.take<Tensor>("bias");
  MlpTensors<Tensor> mlp{in};
  OptionalTensor running_stats = in.take<OptionalTensor>("running_stats");
  int64_t steps = in.take<int64_t>("steps");
  double inner_lr = in.take<double>("inner_lr");
};

struct SibCall {
  Reader& in;
  SibFeatures features{in};
  SibParameters parameters{in};
  bool return_weights = in.take<bool>("return_weights");
};

struct SibForwardCall {
  Reader& in;
  SibCall of{in};
  bool return_stats = in.take<bool>("return_stats"), save_trace = in.take<bool>("save_trace");
};

struct SibBackwardCall {
  Reader& in;
  Tensor grad_logits = in.take<Tensor>("grad_logits");
  OptionalTensor grad_weights = in.take<OptionalTensor>("grad_weights");
  Tensor trace = in.take<Tensor>("trace");
  SibCall of{in};
  bool need_start = in.take<bool>("need_start"), need_query = in.take<bool>("need_query");
};

struct SibGradientsCall {
  Reader& in;
  SibFeatures features{in};
  Tensor query_labels = in.take<Tensor>("query_labels");
  SibParameters parameters{in};
  bool return_stats = in.take<bool>("return_stats");
};

// Checked, and as the kernels read them.
template <class C>
struct SibArguments {
  TensorDevice on;
  TaskFeatures start, query;
  Sizes s;
  std::optional<Labels> labels;
  Parameter<C> weight;
  MlpParameters<C> mlp;
  SibProblem<C> problem;

  SibArguments(const SibFeatures& f, const SibParameters& p, bool return_weights)
      : on(f.query),
        start(on, f.start, f.start_index, "support"),
        query(on, f.query, f.query_index, "query"),
        s(even_sizes(start, query, MlpSizes(p.mlp.weight1).N, MlpSizes(p.mlp.weight1).H, p.steps)),
        mlp(on, p.mlp, p.running_stats, s) {
    Elements()
        .add({s.T + 1, s.K + 1, 5, s.N, padded(s.Q)})
        .add({s.T + 1, s.Q, padded(s.Q)})
        .add({s.K, s.H, padded(s.Q), 4});
    if (f.support_labels) {
      labels.emplace(on, *f.support_labels, s.T, s.S, "support_labels");
      weight = Parameter<C>(on, p.weight, {s.D}, "weight");
    } else {
      require(s.S == s.N, "without support_labels the start is theta0, [T, N, D]");
    }
    require_storage<C>({&start, &query});
    problem = {s,
               query.features(),
               start.features(),
               {labels ? labels->get() : nullptr, nullptr, nullptr},
               weight,
               one_value<C>(on, p.scale, "scale"),
               one_value<C>(on, p.bias, "bias"),
               C(p.inner_lr),
               mlp.arrays(),
               mlp.running(),
               return_weights};
  }
  SibArguments(const SibArguments&) = delete;

  int64_t trace_elements() const { return s.T * trace_size<C>(s, problem.weights); }
  Shape stats_shape() const { return {s.K, 2, 2, s.H}; }
};

// The gradients of the parameters, as sums over tasks.
template <class C>
struct SibParameterGradients {
  Tensor weight, scale, bias;
  MlpGradients<C> mlp;

  SibParameterGradients(const SibArguments<C>& a, const SibParameters& p)
      : weight(empty_if<C>(a.weight.get() != nullptr, a.on, {a.s.D})),
        scale(empty<C>(a.on, shape_of(p.scale))),
        bias(empty<C>(a.on, shape_of(p.bias))),
        mlp(a.on, true, a.s) {}

  template <class AllSums>
  void send(AllSums& sums, const SibParameterGrad<C>& grad, const SibArguments<C>& a) const {
    sums.unfold(grad.mlp, a.s, a.mlp, mlp);
    sums.send(grad.scale, scale);
    sums.send(grad.bias, bias);
    sums.send_if(a.weight.get() != nullptr, grad.weight, weight);
  }
};

struct SibOp {
  static constexpr const char* name = "sib";
  static constexpr size_t results = 4;  // logits, weights, stats, trace
  using Call = SibForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters.scale, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.features.query);
      const bool return_weights = call.of.return_weights;
      const SibArguments<C> a(device.template readable<C>(call.of.features), call.of.parameters,
                              return_weights);
      const typename Device::template Kernel<SibArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      const Tensor logits = empty<C>(a.on, {s.T, s.Q, s.N});
      const Tensor weights = empty_if<C>(return_weights, a.on, {s.T, s.N, s.D});
      const Tensor stats = empty_if<C>(call.return_stats, a.on, a.stats_shape());
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {a.trace_elements()});
      kernel.forward({a.problem, data<C>(logits), data_if<C>(return_weights, weights), nullptr,
                      data_if<C>(call.save_trace, trace)},
                     data_if<C>(call.return_stats, stats));
      return Tensors<results>{logits, weights, stats, trace};
    });
  }
};

struct SibBackwardOp {
  static constexpr const char* name = "sib_backward";
  static constexpr size_t results = 15;  // of start, query, weight, scale, bias, and the MLP's ten
  using Call = SibBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters.scale, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.features.query);
      const SibArguments<C> a(device.template readable<C>(call.of.features), call.of.parameters,
                              call.of.return_weights);
      const typename Device::template Kernel<SibArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      require(!call.grad_weights || a.problem.weights, "grad_weights without return_weights");
      const Parameter<C> grad_logits(a.on, call.grad_logits, {s.T, s.Q, s.N}, "grad_logits");
      const Parameter<C> grad_weights(a.on, call.grad_weights, {s.T, s.N, s.D}, "grad_weights");
      const Parameter<C> trace(a.on, call.trace, {a.trace_elements()}, "trace");
      const Tensor start = empty_if<C>(call.need_start, a.on, {s.T, s.S, s.D});
      const Tensor query = empty_if<C>(call.need_query, a.on, {s.T, s.Q, s.D});
      const SibParameterGradients<C> of(a, call.of.parameters);
      Sums<C, SibParameterGrad<C>> sums(s);
      of.send(sums, sums.grad, a);
      kernel.backward({a.problem, trace, grad_logits, grad_weights, data_if<C>(call.need_query, query),
                       data_if<C>(call.need_start, start)},
                      sums);
      const MlpGradients<C>& m = of.mlp;
      return Tensors<results>{start,    query,     of.weight, of.scale, of.bias,  m.weight1, m.bias1, m.gain1,
                              m.shift1, m.weight2, m.bias2,   m.gain2,  m.shift2, m.weight3, m.bias3};
    });
  }
};

struct SibGradientsOp {
  static constexpr const char* name = "sib_gradients";
  static constexpr size_t results = 16;  // measures [2], logits, stats, and as of sib_backward from weight on
  using Call = SibGradientsCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.parameters.scale, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.features.query);
      require(call.features.support_labels.has_value() && call.parameters.weight.has_value(),
              "sib_gradients needs support_labels and weight");
      const SibArguments<C> a(device.template readable<C>(call.features), call.parameters, false);
      const typename Device::template Kernel<SibArguments<C>> kernel(device, a);
      const Sizes& s = a.s;
      const Labels labels(a.on, call.query_labels, s.T, s.Q, "query_labels", s.N);
      const Tensor measures = empty<C>(a.on, {2}), logits = empty<C>(a.on, {s.T, s.Q, s.N});
      const Tensor stats = empty_if<C>(call.return_stats, a.on, a.stats_shape());
      const SibParameterGradients<C> of(a, call.parameters);
      Sums<C, TrainingSums<C, SibParameterGrad<C>>> sums(s);
      of.send(sums, sums.grad.grad, a);
      sums.send(sums.grad.measures, measures);
      kernel.training(
          {{a.problem, data<C>(logits), nullptr, nullptr, nullptr}, labels.get(), C(1) / C(s.T * s.Q)},
          data_if<C>(call.return_stats, stats), data<C>(measures), sums);
      const MlpGradients<C>& m = of.mlp;
      return Tensors<results>{measures,  logits,   stats,     of.weight, of.scale,  of.bias,
                              m.weight1, m.bias1,  m.gain1,   m.shift1,  m.weight2, m.bias2,
                              m.gain2,   m.shift2, m.weight3, m.bias3};
    });
  }
};

}  // namespace kernelmeta
