// The CUDA implementations of torch.ops.kernelmeta.*, on the current stream of the tensors' device: tensors
// in, launches, tensors out. Nothing waits for the device and nothing is copied to the host, so that all of
// it can be captured in a CUDA graph. A task whose labels or indices cannot be used gives NaN. Only PyTorch's
// stable ABI is used.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/op_support.h"

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sib(
    const Tensor& query, const Optional& query_index, const Tensor& start, const Optional& start_index,
    const Optional& labels, const Optional& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& weight1, const Tensor& bias1, const Tensor& gain1, const Tensor& shift1,
    const Tensor& weight2, const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
    const Tensor& weight3, const Tensor& bias3, const Optional& running, int64_t steps, double lr,
    bool return_weights, bool return_stats, bool save_trace) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, start, labels.has_value());
    const SibArguments<C> a(features.query, query_index, features.start, start_index, labels, weight, scale,
                            bias,
                            {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3},
                            running, steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    const int64_t stats_size = s.K * 4 * s.H;
    const std::vector<int64_t> none{0};
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    Tensor weights = empty(return_weights ? std::vector{s.T, s.N, s.D} : none, kType<C>, a.on);
    Tensor stats = empty(return_stats ? std::vector<int64_t>{s.K, 2, 2, s.H} : none, kType<C>, a.on);
    Tensor trace =
        empty(save_trace ? std::vector{s.T, trace_size<C>(s, return_weights)} : none, kType<C>, a.on);
    const Scratch<C> task_stats(return_stats ? s.T * stats_size : 0, a.on);
    const SibForward<C> run{a.problem, data<C>(logits), return_weights ? data<C>(weights) : nullptr,
                            return_stats ? static_cast<C*>(task_stats) : nullptr,
                            save_trace ? data<C>(trace) : nullptr};
    const Plan plan = plan_sib_forward(run, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_sib_forward<C>(run, plan, memory, where);
    if (return_stats)
      launch_sum_partials<C>(task_stats, s.T, stats_size, C(1) / C(s.T), {data<C>(stats), stats_size}, where);
    return std::tuple{logits, weights, stats, trace};
  });
}

using SibGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SibGradients sib_backward(const Tensor& grad_logits, const Optional& grad_weights, const Tensor& trace,
                          const Tensor& query, const Optional& query_index, const Tensor& start,
                          const Optional& start_index, const Optional& labels, const Optional& weight,
                          const Tensor& scale, const Tensor& bias, const Tensor& weight1, const Tensor& bias1,
                          const Tensor& gain1, const Tensor& shift1, const Tensor& weight2,
                          const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
                          const Tensor& weight3, const Tensor& bias3, const Optional& running, int64_t steps,
                          double lr, bool return_weights, bool need_query, bool need_start) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, start, labels.has_value());
    const SibArguments<C> a(features.query, query_index, features.start, start_index, labels, weight, scale,
                            bias,
                            {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3},
                            running, steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    const SibBackwardArguments<C> b(a, grad_logits, grad_weights, trace, scale, bias, need_query, need_start);
    const Plan plan = plan_sib_backward(b.run, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const Tensor partials = partial_sums<C>(plan, size_of<SibParameterGrad<C>, C>(s), a.on);
    launch_sib_backward<C>(b.run, plan, memory, data<C>(partials), where);
    const Tensor sums = total<C>(partials, where, a.on);
    launch_unfold<C>(s, a.problem.mlp, data<C>(sums), b.mlp.template arrays<C>(), data<C>(b.grad_scale),
                     data<C>(b.grad_bias), a.problem.weight ? data<C>(b.grad_weight) : nullptr, where);
    return SibGradients{b.results()};
  });
}

Tensor synthetic_gradient_mlp(const Tensor& logits, const Tensor& weight1, const Tensor& bias1,
                              const Tensor& gain1, const Tensor& shift1, const Tensor& weight2,
                              const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
                              const Tensor& weight3, const Tensor& bias3, const Optional& running) {
  require(logits.dim() == 3, "logits must be [T, Q, N]");
  return with_type(weight1, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(logits)};
    const MlpArguments<C> a(
        logits, {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running);
    const Sizes& s = a.problem.s;
    Tensor out = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    const Plan plan = plan_mlp(a.problem, false, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_mlp_forward<C>(a.problem, data<C>(out), plan, memory, where);
    return out;
  });
}

using MlpGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

MlpGradients synthetic_gradient_mlp_backward(const Tensor& grad_out, const Tensor& logits,
                                             const Tensor& weight1, const Tensor& bias1, const Tensor& gain1,
                                             const Tensor& shift1, const Tensor& weight2, const Tensor& bias2,
                                             const Tensor& gain2, const Tensor& shift2, const Tensor& weight3,
                                             const Tensor& bias3, const Optional& running) {
  require(logits.dim() == 3, "logits must be [T, Q, N]");
  return with_type(weight1, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(logits)};
    const MlpArguments<C> a(
        logits, {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running);
    const Sizes& s = a.problem.s;
    const Parameter<C> gg(a.on, grad_out, {s.T, s.Q, s.N}, "grad_out");
    Tensor grad_logits = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    const MlpGradTensors g(s, kType<C>, a.on);
    const Plan plan = plan_mlp(a.problem, true, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const Tensor partials = partial_sums<C>(plan, size_of<FoldedMlpGrad<C>, C>(s), a.on);
    launch_mlp_backward<C>(a.problem, gg, data<C>(grad_logits), plan, memory, data<C>(partials), where);
    const Tensor sums = total<C>(partials, where, a.on);
    launch_unfold<C>(s, a.problem.mlp, data<C>(sums), g.template arrays<C>(), nullptr, nullptr, nullptr,
                     where);
    return MlpGradients{grad_logits, g.weight1, g.bias1,  g.gain1,   g.shift1, g.weight2,
                        g.bias2,     g.gain2,   g.shift2, g.weight3, g.bias3};
  });
}

Tensor class_means(const Tensor& support, const Tensor& labels, int64_t n_way, const Optional& weight) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(support)};
    const ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    Tensor theta0 = empty({s.T, s.N, s.D}, kType<C>, a.on);
    const Plan plan = plan_class_means(a.problem, false, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_class_means_forward<C>(a.problem, data<C>(theta0), plan, memory, where);
    return theta0;
  };
  return support.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> class_means_backward(const Tensor& grad_theta0, const Tensor& support,
                                                const Tensor& labels, int64_t n_way, const Optional& weight,
                                                bool need_support) {
  return with_type(grad_theta0, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(support)};
    const ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    const Parameter<C> g(a.on, grad_theta0, {s.T, s.N, s.D}, "grad_theta0");
    const std::vector<int64_t> none{0};
    Tensor grad_support = empty(need_support ? std::vector{s.T, s.S, s.D} : none, kType<C>, a.on);
    const Plan plan = plan_class_means(a.problem, true, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const Tensor partials = partial_sums<C>(plan, weight ? s.D : 0, a.on);
    launch_class_means_backward<C>(a.problem, g, need_support ? data<C>(grad_support) : nullptr, plan, memory,
                                   data<C>(partials), where);
    Tensor grad_weight = empty(weight ? std::vector{s.D} : none, kType<C>, a.on);
    if (weight) {
      launch_sum_partials<C>(data<C>(partials), partials.size(0), s.D, C(1), {data<C>(grad_weight), s.D},
                             where);
    }
    return std::tuple{grad_support, grad_weight};
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_head(const Tensor& support, const Optional& support_index,
                                               const Tensor& labels, const Tensor& query,
                                               const Optional& query_index, const Tensor& weight,
                                               const Tensor& bias, const Tensor& rates, int64_t oracle,
                                               bool first_order, bool return_weights, bool save_trace) {
  return with_type(weight, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const HeadArguments<C> a(features.start, support_index, labels, features.query, query_index, weight, bias,
                             rates, oracle, first_order);
    const Sizes& s = a.problem.s;
    const std::vector<int64_t> none{0};
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    Tensor heads = empty(return_weights ? std::vector{s.T, s.N, s.D + 1} : none, kType<C>, a.on);
    Tensor trace = empty(save_trace ? std::vector{s.T, head_trace_size<C>(s)} : none, kType<C>, a.on);
    const HeadForward<C> run{a.problem, data<C>(logits), return_weights ? data<C>(heads) : nullptr,
                             save_trace ? data<C>(trace) : nullptr};
    const Plan plan = plan_linear_head_forward(run, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    launch_linear_head_forward<C>(run, plan, memory, where);
    return std::tuple{logits, heads, trace};
  });
}

using HeadGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

HeadGradients linear_head_backward(const Tensor& grad_logits, const Optional& grad_heads, const Tensor& trace,
                                   const Tensor& support, const Optional& support_index, const Tensor& labels,
                                   const Tensor& query, const Optional& query_index, const Tensor& weight,
                                   const Tensor& bias, const Tensor& rates, int64_t oracle, bool first_order,
                                   bool need_support, bool need_query) {
  return with_type(weight, [&](auto zero) {
    using C = decltype(zero);
    const OnDevice where{Place(query)};
    const ReadableFeatures<C> features(query, support, true);
    const HeadArguments<C> a(features.start, support_index, labels, features.query, query_index, weight, bias,
                             rates, oracle, first_order);
    const Sizes& s = a.problem.s;
    const HeadBackwardArguments<C> b(a, grad_logits, grad_heads, trace, need_support, need_query);
    const Plan plan = plan_linear_head_backward(b.run, a.on.index);
    const Scratch<C> memory = workspace<C>(plan, a.on);
    const GradLayout<HeadParameterGrad<C>, C> layout(s);
    const Tensor partials = partial_sums<C>(plan, layout.size(), a.on);
    launch_linear_head_backward<C>(b.run, plan, memory, data<C>(partials), where);
    Pieces<C> to;
    layout.add(to, layout.grad.weight, s.N * s.D, data<C>(b.grad_weight));
    layout.add(to, layout.grad.bias, s.N, data<C>(b.grad_bias));
    layout.add(to, layout.grad.rates, s.K, data<C>(b.grad_rates));
    launch_sum_partials<C>(data<C>(partials), partials.size(0), layout.size(), C(1), to, where);
    return HeadGradients{b.results()};
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CUDA, library) {
  library.impl("sib", TORCH_BOX(&sib));
  library.impl("sib_backward", TORCH_BOX(&sib_backward));
  library.impl("synthetic_gradient_mlp", TORCH_BOX(&synthetic_gradient_mlp));
  library.impl("synthetic_gradient_mlp_backward", TORCH_BOX(&synthetic_gradient_mlp_backward));
  library.impl("class_means", TORCH_BOX(&class_means));
  library.impl("class_means_backward", TORCH_BOX(&class_means_backward));
  library.impl("linear_head", TORCH_BOX(&linear_head));
  library.impl("linear_head_backward", TORCH_BOX(&linear_head_backward));
}

}  // namespace
