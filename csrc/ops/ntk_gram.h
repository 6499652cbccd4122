// The tensor side of `ntk_gram` and its backward, once for all devices. How a device runs them:
// cpu/ntk_gram.h, cuda/ntk_gram.h.
#pragma once

#include "engine/ntk_gram.h"
#include "ops/network.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct NtkCall {
  Reader& in;
  Tensor support = in.take<Tensor>("support");
  OptionalTensor support_index = in.take<OptionalTensor>("support_index");
  Tensor query = in.take<Tensor>("query");
  OptionalTensor query_index = in.take<OptionalTensor>("query_index");
  Tensor parameters = in.take<Tensor>("parameters");
  NetworkOptions options{in};
  bool full = in.take<bool>("full");
};

struct NtkForwardCall {
  Reader& in;
  NtkCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct NtkBackwardCall {
  Reader& in;
  Tensor grad_gram = in.take<Tensor>("grad_gram");
  OptionalTensor grad_cross = in.take<OptionalTensor>("grad_cross");
  OptionalTensor grad_support_outputs = in.take<OptionalTensor>("grad_support_outputs");
  OptionalTensor grad_query_outputs = in.take<OptionalTensor>("grad_query_outputs");
  Tensor trace = in.take<Tensor>("trace");
  NtkCall of{in};
  bool need_support = in.take<bool>("need_support"), need_query = in.take<bool>("need_query");
};

// Checked, and as the kernels read them.
template <class C>
struct NtkArguments {
  TensorDevice on;
  TaskFeatures support, query;
  Perceptron net;
  Parameter<C> parameters;
  NtkProblem<C> problem;

  explicit NtkArguments(const NtkCall& call)
      : on(call.query),
        support(on, call.support, call.support_index, "support"),
        query(on, call.query, call.query_index, "query"),
        net(perceptron(call.options)),
        parameters(on, call.parameters, {net.parameters()}, "parameters") {
    const int64_t T = support.T(), S = support.rows(), Q = query.rows(), N = net.outputs();
    require(T == query.T(), "support and query must have the same T");
    require(support.D() == net.features() && query.D() == net.features(),
            "support and query must have as many features as the network reads");
    require(S >= 1, "support rows: at least one");
    require_storage<C>({&support, &query});
    Elements count;
    count.add({T + 1, call.full ? N * N : 1, S + 16, S + Q + 32, 2}).add({T + 1, N, S + Q + 32});
    for (int l = 0; l < net.layers; ++l) count.add({T + 1, net.widths[l + 1] + 16, N + 1, S + Q + 32});
    problem = {T,        S, Q, net, support.features(), query.features(), parameters, C(call.options.slope),
               call.full};
  }
  NtkArguments(const NtkArguments&) = delete;

  int64_t trace_elements() const { return problem.T * ntk_trace_size<C>(problem); }
  // Of the kernel of so many rows with the support rows.
  Shape kernel(int64_t rows) const {
    const int64_t N = problem.full ? net.outputs() : 1;
    return {problem.T, rows * N, problem.S * N};
  }
  Shape outputs(int64_t rows) const { return {problem.T, rows, net.outputs()}; }
};

struct NtkOp {
  static constexpr const char* name = "ntk_gram";
  static constexpr size_t results = 5;  // gram, cross, support_outputs, query_outputs, trace
  using Call = NtkForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.query);
      const NtkArguments<C> a(device.template readable<C>(call.of));
      const typename Device::template Kernel<NtkArguments<C>> kernel(device, a);
      const NtkProblem<C>& p = a.problem;
      const Tensor gram = empty<C>(a.on, a.kernel(p.S)), cross = empty<C>(a.on, a.kernel(p.Q));
      const Tensor support = empty<C>(a.on, a.outputs(p.S)), query = empty<C>(a.on, a.outputs(p.Q));
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {a.trace_elements()});
      kernel.forward({p, data<C>(gram), data<C>(cross), data<C>(support), data<C>(query),
                      data_if<C>(call.save_trace, trace)});
      return Tensors<results>{gram, cross, support, query, trace};
    });
  }
};

struct NtkBackwardOp {
  static constexpr const char* name = "ntk_gram_backward";
  static constexpr size_t results = 3;  // of support, query, parameters
  using Call = NtkBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.parameters, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.query);
      const NtkArguments<C> a(device.template readable<C>(call.of));
      const typename Device::template Kernel<NtkArguments<C>> kernel(device, a);
      const NtkProblem<C>& p = a.problem;
      const int64_t D = p.net.features();
      const Parameter<C> grad_gram(a.on, call.grad_gram, a.kernel(p.S), "grad_gram");
      const Parameter<C> grad_cross(a.on, call.grad_cross, a.kernel(p.Q), "grad_cross");
      const Parameter<C> of_support(a.on, call.grad_support_outputs, a.outputs(p.S), "grad_support_outputs");
      const Parameter<C> of_query(a.on, call.grad_query_outputs, a.outputs(p.Q), "grad_query_outputs");
      const Parameter<C> trace(a.on, call.trace, {a.trace_elements()}, "trace");
      const Tensor support = empty_if<C>(call.need_support, a.on, {p.T, p.S, D});
      const Tensor query = empty_if<C>(call.need_query, a.on, {p.T, p.Q, D});
      const Tensor parameters = empty<C>(a.on, {p.net.parameters()});
      Sums<C, NtkGrad<C>> sums(p.net);
      sums.send(sums.grad.parameters, parameters);
      kernel.backward({p, trace, grad_gram, grad_cross, of_support, of_query,
                       data_if<C>(call.need_support, support), data_if<C>(call.need_query, query)},
                      sums);
      return Tensors<results>{support, query, parameters};
    });
  }
};

}  // namespace kernelmeta
