// The CUDA implementations of program and ridge; see ops.cpp. Where tasks differ in size and the caller does
// not say how large they are at most, and only there, a call waits for the device, to read the sizes.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/op_support.h"
#include "task_arguments.h"

namespace {

// The arguments and how the kernels run.
template <class C>
struct CudaProgram : ProgramArguments<C> {
  using ProgramArguments<C>::problem, ProgramArguments<C>::phases, ProgramArguments<C>::mlp;
  std::vector<int64_t> tasks;  // one of each size, or of the largest
  ProgramDeviceCall<C> call{};

  template <class... Args>
  explicit CudaProgram(const Args&... args)
      : ProgramArguments<C>(args...), tasks(this->tasks_of_each_size()) {
    constexpr size_t kMost = ProgramDeviceCall<C>::kMostPhases;
    if (phases.size() > kMost) {
      refuse("phases: expected at most " + std::to_string(kMost) + " on a GPU, got " +
             std::to_string(phases.size()));
    }
    std::copy(phases.begin(), phases.end(), call.phases);
    call.sizes = this->sizes();
    if (mlp) {
      call.mlp = mlp->arrays();
      call.running = mlp->running();
    }
    const ProgramProblem<C> known = this->on_host();
    for (const int64_t t : tasks) {
      call.stride = std::max(call.stride, program_trace_size(known, known.shape(t, phases.data())));
    }
  }
};

using ProgramResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ProgramResults program(const Tensor& query, const Optional& query_index, const Tensor& support,
                       const Optional& support_index, const Tensor& labels, const Optional& support_offsets,
                       const Optional& query_offsets, const Optional& n_ways, const Optional& theta0,
                       const Optional& weight, const Optional& scale, const Optional& bias,
                       const Optional& target, const Tensor& rates, const Optional& weight1,
                       const Optional& bias1, const Optional& gain1, const Optional& shift1,
                       const Optional& weight2, const Optional& bias2, const Optional& gain2,
                       const Optional& shift2, const Optional& weight3, const Optional& bias3,
                       const Optional& running, int64_t n_way, std::vector<int64_t> phases, bool cosine,
                       int64_t start, bool first_order, bool coefficients, int64_t max_support,
                       int64_t max_query, bool save_trace) {
  return with_type(rates, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const CudaProgram<C> a(
        features.query, query_index, features.start, support_index, labels, support_offsets, query_offsets,
        n_ways, max_support, max_query, theta0, weight, scale, bias, target, rates,
        MlpOptionals{&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3},
        running, n_way, phases, cosine, start, first_order, coefficients);
    const auto type = kType<C>;
    const int64_t T = a.problem.T;
    const std::vector<int64_t> none{0};
    Tensor logits = empty(a.query.shape(n_way), type, a.on);
    Tensor of_support = empty(coefficients ? a.support.shape(n_way) : none, type, a.on);
    Tensor of_query = empty(coefficients ? a.query.shape(n_way) : none, type, a.on);
    Tensor of_start = empty(coefficients ? std::vector{T, n_way} : none, type, a.on);
    Tensor trace = empty({save_trace ? T * a.call.stride : 0}, type, a.on);
    ProgramForward<C> run{a.problem, data<C>(logits), nullptr,
                          nullptr,   nullptr,         save_trace ? data<C>(trace) : nullptr};
    if (coefficients) {
      run.support_coefficients = data<C>(of_support);
      run.query_coefficients = data<C>(of_query);
      run.start_coefficients = data<C>(of_start);
    }
    ProgramForward<C> known = run;
    known.problem = a.on_host();
    const Plan plan = plan_program_forward<C>(known, a.call, a.tasks, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_program_forward<C>(run, a.call, plan, memory, where);
    return ProgramResults{logits, of_support, of_query, of_start, trace};
  });
}

using ProgramGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ProgramGradients program_backward(const Tensor& grad_logits, const Optional& grad_of_support,
                                  const Optional& grad_of_query, const Optional& grad_of_start,
                                  const Tensor& trace, const Tensor& query, const Optional& query_index,
                                  const Tensor& support, const Optional& support_index, const Tensor& labels,
                                  const Optional& support_offsets, const Optional& query_offsets,
                                  const Optional& n_ways, const Optional& theta0, const Optional& weight,
                                  const Optional& scale, const Optional& bias, const Optional& target,
                                  const Tensor& rates, const Optional& weight1, const Optional& bias1,
                                  const Optional& gain1, const Optional& shift1, const Optional& weight2,
                                  const Optional& bias2, const Optional& gain2, const Optional& shift2,
                                  const Optional& weight3, const Optional& bias3, const Optional& running,
                                  int64_t n_way, std::vector<int64_t> phases, bool cosine, int64_t start,
                                  bool first_order, bool coefficients, int64_t max_support, int64_t max_query,
                                  bool need_query, bool need_support) {
  return with_type(rates, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const CudaProgram<C> a(
        features.query, query_index, features.start, support_index, labels, support_offsets, query_offsets,
        n_ways, max_support, max_query, theta0, weight, scale, bias, target, rates,
        MlpOptionals{&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3},
        running, n_way, phases, cosine, start, first_order, coefficients);
    const ProgramProblem<C>& p = a.problem;
    const auto type = kType<C>;
    const ProgramBackwardArguments<C> b(a, grad_logits, grad_of_support, grad_of_query, grad_of_start, trace,
                                        p.T * a.call.stride, need_query, need_support);
    ProgramBackward<C> known = b.run;
    known.problem = a.on_host();
    const Plan plan = plan_program_backward<C>(known, a.call, a.tasks, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const GradLayout<ProgramGrad<C>, C> layout(known.problem);
    const Tensor partials = partial_sums<C>(plan, layout.size(), a.on);
    launch_program_backward<C>(b.run, a.call, plan, memory, data<C>(partials), where);

    Pieces<C> to;
    const auto out = [&](const C* part, const Optional& like, bool used) {
      if (!like) return empty({0}, type, a.on);
      Tensor result = empty(sizes(*like), type, a.on);
      if (used)
        layout.add(to, part, like->numel(), data<C>(result));
      else
        torch::stable::zero_(result);
      return result;
    };
    const ProgramGrad<C>& sum = layout.grad;
    Tensor grad_theta0 = out(sum.theta0, theta0, p.start == Start::kLearned);
    Tensor grad_weight = out(sum.weight, weight, p.weight != nullptr);
    Tensor grad_scale = out(sum.scale, scale, true);
    Tensor grad_bias = out(cosine ? sum.bias : sum.start_bias, bias, true);
    Tensor grad_target = out(sum.target, target, true);
    Tensor grad_rates = out(sum.rates, rates, true);
    const Scratch<C> sums(a.mlp ? layout.size() : 0, a.on);
    if (a.mlp) to.add(0, layout.size(), sums);
    launch_sum_partials<C>(data<C>(partials), partials.size(0), layout.size(), C(1), to, where);
    const MlpGradTensors g(a.sizes(), type, a.on);
    if (a.mlp) {
      launch_unfold<C>(a.sizes(), a.call.mlp, sums + layout.offset(sum.mlp.w1t), g.template arrays<C>(),
                       nullptr, nullptr, nullptr, where);
    }
    return ProgramGradients{b.grad_query, b.grad_support, grad_theta0, grad_weight, grad_scale, grad_bias,
                            grad_target,  grad_rates,     g.weight1,   g.bias1,     g.gain1,    g.shift1,
                            g.weight2,    g.bias2,        g.gain2,     g.shift2,    g.weight3,  g.bias3};
  });
}

// The arguments and how the kernels run.
template <class C>
struct CudaRidge : RidgeArguments<C> {
  std::vector<int64_t> tasks;  // one of each size, or of the largest
  int64_t stride = 0;

  template <class... Args>
  explicit CudaRidge(const Args&... args) : RidgeArguments<C>(args...), tasks(this->tasks_of_each_size()) {
    const RidgeProblem<C> known = this->on_host();
    for (const int64_t t : tasks) stride = std::max(stride, ridge_trace_size<C>(known.sizes(t)));
  }
};

std::tuple<Tensor, Tensor, Tensor> ridge(const Tensor& query, const Optional& query_index,
                                         const Tensor& support, const Optional& support_index,
                                         const Tensor& labels, const Optional& support_offsets,
                                         const Optional& query_offsets, const Optional& n_ways,
                                         const Tensor& lambda, const Tensor& scale, const Tensor& bias,
                                         int64_t n_way, int64_t max_support, int64_t max_query,
                                         bool save_trace) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const CudaRidge<C> a(features.query, query_index, features.start, support_index, labels, support_offsets,
                         query_offsets, n_ways, max_support, max_query, lambda, scale, bias, n_way);
    Tensor logits = empty(a.query.shape(n_way), kType<C>, a.on);
    Tensor coefficients = empty(a.support.shape(n_way), kType<C>, a.on);
    Tensor trace = empty({save_trace ? a.problem.T * a.stride : 0}, kType<C>, a.on);
    const RidgeForward<C> run{a.problem, data<C>(logits), data<C>(coefficients),
                              save_trace ? data<C>(trace) : nullptr};
    RidgeForward<C> known = run;
    known.problem = a.on_host();
    const Plan plan = plan_ridge_forward<C>(known, a.stride, a.tasks, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_ridge_forward<C>(run, a.stride, plan, memory, where);
    return std::tuple{logits, coefficients, trace};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ridge_backward(
    const Tensor& grad_logits, const Optional& grad_coefficients, const Tensor& trace, const Tensor& query,
    const Optional& query_index, const Tensor& support, const Optional& support_index, const Tensor& labels,
    const Optional& support_offsets, const Optional& query_offsets, const Optional& n_ways,
    const Tensor& lambda, const Tensor& scale, const Tensor& bias, int64_t n_way, int64_t max_support,
    int64_t max_query, bool need_query, bool need_support) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const CudaRidge<C> a(features.query, query_index, features.start, support_index, labels, support_offsets,
                         query_offsets, n_ways, max_support, max_query, lambda, scale, bias, n_way);
    const RidgeBackwardArguments<C> b(a, grad_logits, grad_coefficients, trace, a.problem.T * a.stride,
                                      lambda, scale, bias, need_query, need_support);
    RidgeBackward<C> known = b.run;
    known.problem = a.on_host();
    const Plan plan = plan_ridge_backward<C>(known, a.stride, a.tasks, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const GradLayout<RidgeGrad<C>, C> layout;
    const Tensor partials = partial_sums<C>(plan, layout.size(), a.on);
    launch_ridge_backward<C>(b.run, a.stride, plan, memory, data<C>(partials), where);
    Pieces<C> to;
    layout.add(to, layout.grad.lambda, 1, data<C>(b.grad_lambda));
    layout.add(to, layout.grad.scale, 1, data<C>(b.grad_scale));
    layout.add(to, layout.grad.bias, 1, data<C>(b.grad_bias));
    launch_sum_partials<C>(data<C>(partials), partials.size(0), layout.size(), C(1), to, where);
    return b.results();
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CUDA, library) {
  library.impl("program", TORCH_BOX(&program));
  library.impl("program_backward", TORCH_BOX(&program_backward));
  library.impl("ridge", TORCH_BOX(&ridge));
  library.impl("ridge_backward", TORCH_BOX(&ridge_backward));
}

}  // namespace
