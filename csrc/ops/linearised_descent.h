// The tensor side of `linearised_descent` and its backward, once for all devices. How a device runs them:
// cpu/linearised_descent.h, cuda/linearised_descent.h.
#pragma once

#include "engine/linearised_descent.h"
#include "ops/network.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct DescentCall {
  Reader& in;
  Tensor support = in.take<Tensor>("support");
  OptionalTensor support_index = in.take<OptionalTensor>("support_index");
  Tensor query = in.take<Tensor>("query");
  OptionalTensor query_index = in.take<OptionalTensor>("query_index");
  Tensor targets = in.take<Tensor>("targets"), row_weights = in.take<Tensor>("row_weights");
  Tensor parameters = in.take<Tensor>("parameters");
  Tensor lr = in.take<Tensor>("lr"), weight_decay = in.take<Tensor>("weight_decay");
  NetworkOptions options{in};
  int64_t steps = in.take<int64_t>("steps");
  bool cross_entropy = in.take<bool>("cross_entropy");
};

struct DescentForwardCall {
  Reader& in;
  DescentCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct DescentBackwardCall {
  Reader& in;
  Tensor grad_outputs = in.take<Tensor>("grad_outputs");
  OptionalTensor grad_coefficients = in.take<OptionalTensor>("grad_coefficients");
  Tensor trace = in.take<Tensor>("trace");
  DescentCall of{in};
  bool need_support = in.take<bool>("need_support"), need_query = in.take<bool>("need_query");
};

// Checked, and as the kernels read them.
template <class C>
struct DescentArguments {
  TensorDevice on;
  TaskFeatures support, query;
  Perceptron net;
  Parameter<C> targets, row_weights, parameters;
  DescentProblem<C> problem;

  explicit DescentArguments(const DescentCall& call)
      : on(call.query),
        support(on, call.support, call.support_index, "support"),
        query(on, call.query, call.query_index, "query"),
        net(perceptron(call.options)),
        targets(on, call.targets, {support.T(), support.rows(), net.outputs()}, "targets"),
        row_weights(on, call.row_weights, {support.T(), support.rows()}, "row_weights"),
        parameters(on, call.parameters, {net.parameters()}, "parameters") {
    const int64_t T = support.T(), S = support.rows(), Q = query.rows(), N = net.outputs();
    require(T == query.T(), "support and query must have the same T");
    require(support.D() == net.features() && query.D() == net.features(),
            "support and query must have as many features as the network reads");
    require(S >= 1 && Q >= 1, "support and query rows: at least one each");
    require(call.steps >= 0 && call.steps <= kMostSteps, "steps: from 0 to 2^20");
    require_storage<C>({&support, &query});
    Elements count;
    count.add({T + 1, N, S + 16, N, S + 16}).add({T + 1, N, Q + 16}).add({kBranch, kBranch, N, S + 32});
    for (int l = 0; l < net.layers; ++l) {
      count.add({T + 1, net.widths[l + 1] + 16, N + 2, S + 16})
          .add({T + 1, net.widths[l + 1] + 16, 6, Q + 16});
      count.add({T + 1, S + 16, S + Q + 32});
    }
    problem = {T,
               S,
               Q,
               net,
               support.features(),
               query.features(),
               targets,
               row_weights,
               parameters,
               one_value<C>(on, call.lr, "lr"),
               one_value<C>(on, call.weight_decay, "weight_decay"),
               C(call.options.slope),
               call.steps,
               call.cross_entropy};
  }
  DescentArguments(const DescentArguments&) = delete;

  int64_t trace_elements() const { return problem.T * descent_trace_size<C>(problem); }
};

struct DescentOp {
  static constexpr const char* name = "linearised_descent";
  static constexpr size_t results = 3;  // outputs, coefficients, trace
  using Call = DescentForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.query);
      const DescentArguments<C> a(device.template readable<C>(call.of));
      const typename Device::template Kernel<DescentArguments<C>> kernel(device, a);
      const DescentProblem<C>& p = a.problem;
      const Tensor outputs = empty<C>(a.on, {p.T, p.Q, p.net.outputs()});
      const Tensor coefficients = empty<C>(a.on, {p.T, p.S, p.net.outputs()});
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {a.trace_elements()});
      kernel.forward({p, data<C>(outputs), data<C>(coefficients), data_if<C>(call.save_trace, trace)});
      return Tensors<results>{outputs, coefficients, trace};
    });
  }
};

struct DescentBackwardOp {
  static constexpr const char* name = "linearised_descent_backward";
  // of support, query, targets, row_weights, parameters, lr, weight_decay
  static constexpr size_t results = 7;
  using Call = DescentBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.query);
      const DescentArguments<C> a(device.template readable<C>(call.of));
      const typename Device::template Kernel<DescentArguments<C>> kernel(device, a);
      const DescentProblem<C>& p = a.problem;
      const int64_t N = p.net.outputs(), D = p.net.features();
      const Parameter<C> grad_outputs(a.on, call.grad_outputs, {p.T, p.Q, N}, "grad_outputs");
      const Parameter<C> grad_coefficients(a.on, call.grad_coefficients, {p.T, p.S, N}, "grad_coefficients");
      const Parameter<C> trace(a.on, call.trace, {a.trace_elements()}, "trace");
      const Tensor support = empty_if<C>(call.need_support, a.on, {p.T, p.S, D});
      const Tensor query = empty_if<C>(call.need_query, a.on, {p.T, p.Q, D});
      const Tensor targets = empty<C>(a.on, {p.T, p.S, N}), row_weights = empty<C>(a.on, {p.T, p.S});
      const Tensor parameters = empty<C>(a.on, {p.net.parameters()});
      const Tensor lr = empty<C>(a.on, shape_of(call.of.lr));
      const Tensor weight_decay = empty<C>(a.on, shape_of(call.of.weight_decay));
      Sums<C, DescentGrad<C>> sums(p.net);
      sums.send(sums.grad.parameters, parameters);
      sums.send(sums.grad.lr, lr);
      sums.send(sums.grad.decay, weight_decay);
      kernel.backward({p, trace, grad_outputs, grad_coefficients, data_if<C>(call.need_support, support),
                       data_if<C>(call.need_query, query), data<C>(targets), data<C>(row_weights)},
                      sums);
      return Tensors<results>{support, query, targets, row_weights, parameters, lr, weight_decay};
    });
  }
};

}  // namespace kernelmeta
