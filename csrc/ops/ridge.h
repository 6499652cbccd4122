// The tensor side of `ridge` and its backward, once for all devices. How a device runs them: cpu/ridge.h,
// cuda/ridge.h.
#pragma once

#include "engine/ridge_task.h"
#include "ops/sums.h"
#include "ops/tasks.h"

namespace kernelmeta {

struct RidgeCall {
  Reader& in;
  RaggedRowTensors rows{{in}};
  Tensor regularization = in.take<Tensor>("regularization");
  Tensor scale = in.take<Tensor>("scale"), bias = in.take<Tensor>("bias");
  int64_t n_way = in.take<int64_t>("n_way");
  int64_t max_support = in.take<int64_t>("max_support"), max_query = in.take<int64_t>("max_query");
};

struct RidgeForwardCall {
  Reader& in;
  RidgeCall of{in};
  bool save_trace = in.take<bool>("save_trace");
};

struct RidgeBackwardCall {
  Reader& in;
  Tensor grad_logits = in.take<Tensor>("grad_logits");
  OptionalTensor grad_coefficients = in.take<OptionalTensor>("grad_coefficients");
  Tensor trace = in.take<Tensor>("trace");
  RidgeCall of{in};
  bool need_support = in.take<bool>("need_support"), need_query = in.take<bool>("need_query");
};

// Checked, and as the kernels read them.
template <class C>
struct RidgeArguments : RaggedArguments {
  RidgeProblem<C> problem;

  RidgeArguments(const RaggedRowTensors& rows, const RidgeCall& call)
      : RaggedArguments(rows, call.n_way, call.max_support, call.max_query) {
    require_storage<C>({&support, &query});
    const int64_t T = query.T(), N = call.n_way;
    Elements().add({support.all_rows() + query.all_rows() + 32 * (T + 1), N + 1}).add({T + 1, N + 1});
    for (int64_t t = 0; t < (support.known() ? T : 1); ++t) {
      const int64_t S = support.count(t) + 16, Q = query.count(t) + 16;
      Elements().add({support.known() ? 1 : T, S, S + Q + N}).add({T, Q, N});
      if (!support.ragged()) break;
    }
    problem = {T,
               N,
               query.D(),
               support.task_rows(),
               query.task_rows(),
               labels.classes(),
               one_value<C>(on, call.regularization, "regularization"),
               one_value<C>(on, call.scale, "scale"),
               one_value<C>(on, call.bias, "bias")};
  }
  RidgeArguments(const RidgeArguments&) = delete;

  // The problem as the host can look at it, sizes of tasks and all.
  RidgeProblem<C> on_host() const {
    static const C one = C(1);
    RidgeProblem<C> p = problem;
    put_tasks_on_host(p);
    p.lambda = p.scale = p.bias = &one;
    return p;
  }
};

struct RidgeOp {
  static constexpr const char* name = "ridge";
  static constexpr size_t results = 3;  // logits, coefficients, trace
  using Call = RidgeForwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.scale, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.rows.query);
      const RidgeArguments<C> a(device.template readable<C>(call.of.rows), call.of);
      const typename Device::template Kernel<RidgeArguments<C>> kernel(device, a);
      const Tensor logits = empty<C>(a.on, a.query.shape(a.problem.N));
      const Tensor coefficients = empty<C>(a.on, a.support.shape(a.problem.N));
      const Tensor trace = empty_if<C>(call.save_trace, a.on, {kernel.trace_elements()});
      kernel.forward({a.problem, data<C>(logits), data<C>(coefficients), data_if<C>(call.save_trace, trace)});
      return Tensors<results>{logits, coefficients, trace};
    });
  }
};

struct RidgeBackwardOp {
  static constexpr const char* name = "ridge_backward";
  static constexpr size_t results = 5;  // of support, query, regularization, scale, bias
  using Call = RidgeBackwardCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    return with_type(call.of.scale, [&](auto zero) {
      using C = decltype(zero);
      const Device device(call.of.rows.query);
      const RidgeArguments<C> a(device.template readable<C>(call.of.rows), call.of);
      const typename Device::template Kernel<RidgeArguments<C>> kernel(device, a);
      const Parameter<C> grad_logits(a.on, call.grad_logits, a.query.shape(a.problem.N), "grad_logits");
      const Parameter<C> grad_coefficients(a.on, call.grad_coefficients, a.support.shape(a.problem.N),
                                           "grad_coefficients");
      const Parameter<C> trace(a.on, call.trace, {kernel.trace_elements()}, "trace");
      const Tensor support = empty_if<C>(call.need_support, a.on, a.support.shape(a.problem.D));
      const Tensor query = empty_if<C>(call.need_query, a.on, a.query.shape(a.problem.D));
      const Tensor regularization = empty<C>(a.on, shape_of(call.of.regularization));
      const Tensor scale = empty<C>(a.on, shape_of(call.of.scale)),
                   bias = empty<C>(a.on, shape_of(call.of.bias));
      Sums<C, RidgeGrad<C>> sums;
      sums.send(sums.grad.lambda, regularization);
      sums.send(sums.grad.scale, scale);
      sums.send(sums.grad.bias, bias);
      kernel.backward({a.problem, trace, grad_logits, grad_coefficients,
                       data_if<C>(call.need_support, support), data_if<C>(call.need_query, query)},
                      sums);
      return Tensors<results>{support, query, regularization, scale, bias};
    });
  }
};

}  // namespace kernelmeta
