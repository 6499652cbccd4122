// The CPU implementations of torch.ops.kernelmeta.*: tensors in, kernels over tasks, tensors out.
// Schemas stand in kernelmeta/ops beside the fake kernels and the derivatives. Only PyTorch's stable ABI is
// used.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "cpu/op_support.h"

namespace {

// Multiplications that one task takes, roughly.
int64_t mlp_work(const Sizes& s) { return s.Q * s.H * (2 * s.N + s.H); }
int64_t sib_work(const Sizes& s) {
  return s.Q * s.D * std::min(s.Q / 2, 4 * s.K * s.N) + s.Q * s.N * s.D +
         s.K * (mlp_work(s) + s.Q * s.Q * s.N);
}
int64_t class_means_work(const Sizes& s) { return (2 * s.S + s.N) * s.D; }

// Statistics of every task, averaged in the order of the tasks into `out`.
template <class C>
void average(const C* per_task, int64_t T, int64_t size, C* out) {
  for (int64_t i = 0; i < size; ++i) {
    C sum = 0;
    for (int64_t t = 0; t < T; ++t) sum += per_task[t * size + i];
    out[i] = sum / C(T);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sib(
    const Tensor& query, const Optional& query_index, const Tensor& start, const Optional& start_index,
    const Optional& labels, const Optional& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& weight1, const Tensor& bias1, const Tensor& gain1, const Tensor& shift1,
    const Tensor& weight2, const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
    const Tensor& weight3, const Tensor& bias3, const Optional& running, int64_t steps, double lr,
    bool return_weights, bool return_stats, bool save_trace) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    SibArguments<C> a(query, query_index, start, start_index, labels, weight, scale, bias,
                      {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running,
                      steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    std::optional<ClassLists> classes;
    if (labels) a.problem.classes = classes.emplace(a.labels->get(), s.T, s.S, s.N).table();
    const Folded<C> mlp(a.mlp, s);
    const int64_t stats_size = s.K * 4 * s.H;
    const std::vector<int64_t> none{0};
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    Tensor weights = empty(return_weights ? std::vector{s.T, s.N, s.D} : none, kType<C>, a.on);
    Tensor stats = empty(return_stats ? std::vector<int64_t>{s.K, 2, 2, s.H} : none, kType<C>, a.on);
    Tensor trace = empty_trace<C>(save_trace ? std::vector{s.T, trace_size<C>(s, return_weights)} : none);
    std::unique_ptr<C[]> task_stats;
    if (return_stats && s.T > 1) task_stats.reset(new C[size_t(s.T * stats_size)]);
    C* stats_out = !return_stats ? nullptr : task_stats ? task_stats.get() : data<C>(stats);
    const SibForward<C> run{a.problem, data<C>(logits), return_weights ? data<C>(weights) : nullptr,
                            stats_out, save_trace ? data<C>(trace) : nullptr};
    over_tasks(s.T, sib_work(s),
               [&](int64_t begin, int64_t end) { kernels<C>().sib_forward(run, mlp, begin, end); });
    if (return_stats && s.T != 1) average(stats_out, s.T, stats_size, data<C>(stats));
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
    SibArguments<C> a(query, query_index, start, start_index, labels, weight, scale, bias,
                      {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running,
                      steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    std::optional<ClassLists> classes;
    if (labels) a.problem.classes = classes.emplace(a.labels->get(), s.T, s.S, s.N).table();
    const Folded<C> mlp(a.mlp, s);
    const SibBackwardArguments<C> b(a, grad_logits, grad_weights, trace, scale, bias, need_query, need_start);
    const auto sums = sum_over_tasks<C>(s.T, 2 * sib_work(s), size_of<SibParameterGrad<C>, C>(s),
                                        [&](C* partial, int64_t begin, int64_t end) {
                                          Arena<C> arena(partial);
                                          const SibParameterGrad<C> grad(arena, s);
                                          kernels<C>().sib_backward(b.run, mlp, grad, begin, end);
                                        });
    Arena<C> arena(sums.get());
    const SibParameterGrad<C> total(arena, s);
    unfold_into<C>(b.mlp, a.mlp, total.mlp, s);
    *data<C>(b.grad_scale) = *total.scale;
    *data<C>(b.grad_bias) = *total.bias;
    if (a.problem.weight) std::copy(total.weight, total.weight + s.D, data<C>(b.grad_weight));
    return SibGradients{b.results()};
  });
}

using SibTrainingResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                      Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SibTrainingResults sib_gradients(const Tensor& query, const Optional& query_index, const Tensor& support,
                                 const Optional& support_index, const Tensor& support_labels,
                                 const Tensor& weight, const Tensor& scale, const Tensor& bias,
                                 const Tensor& weight1, const Tensor& bias1, const Tensor& gain1,
                                 const Tensor& shift1, const Tensor& weight2, const Tensor& bias2,
                                 const Tensor& gain2, const Tensor& shift2, const Tensor& weight3,
                                 const Tensor& bias3, const Optional& running, const Tensor& query_labels,
                                 int64_t steps, double lr, bool return_stats) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    using Sums = typename SibTraining<C>::Sums;
    SibArguments<C> a(query, query_index, support, support_index, support_labels, weight, scale, bias,
                      {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running,
                      steps, lr, false);
    const Sizes& s = a.problem.s;
    const ClassLists classes(a.labels->get(), s.T, s.S, s.N);
    a.problem.classes = classes.table();
    const Labels answers(a.on, query_labels, s.T, s.Q, "query_labels");
    answers.require_below(s.N);
    const Folded<C> mlp(a.mlp, s);
    const int64_t stats_size = s.K * 4 * s.H;
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>);
    Tensor stats =
        empty(return_stats ? std::vector<int64_t>{s.K, 2, 2, s.H} : std::vector<int64_t>{0}, kType<C>);
    std::unique_ptr<C[]> task_stats;
    if (return_stats && s.T > 1) task_stats.reset(new C[size_t(s.T * stats_size)]);
    C* stats_out = !return_stats ? nullptr : task_stats ? task_stats.get() : data<C>(stats);
    const SibTraining<C> run{
        {a.problem, data<C>(logits), nullptr, stats_out, nullptr}, answers.get(), C(1) / C(s.T * s.Q)};
    const auto sums = sum_over_tasks<C>(s.T, 3 * sib_work(s), size_of<Sums, C>(s),
                                        [&](C* partial, int64_t begin, int64_t end) {
                                          Arena<C> arena(partial);
                                          kernels<C>().sib_training(run, mlp, Sums(arena, s), begin, end);
                                        });
    if (return_stats && s.T != 1) average(stats_out, s.T, stats_size, data<C>(stats));
    Arena<C> arena(sums.get());
    const Sums total(arena, s);
    Tensor measures = empty({2}, kType<C>), grad_weight = empty({s.D}, kType<C>);
    Tensor grad_scale = empty(sizes(scale), kType<C>), grad_bias = empty(sizes(bias), kType<C>);
    const MlpGradTensors g(s, kType<C>);
    unfold_into<C>(g, a.mlp, total.grad.mlp, s);
    *data<C>(grad_scale) = *total.grad.scale;
    *data<C>(grad_bias) = *total.grad.bias;
    std::copy(total.grad.weight, total.grad.weight + s.D, data<C>(grad_weight));
    for (int64_t i = 0; i < 2; ++i) data<C>(measures)[i] = total.measures[i] * run.share;
    return SibTrainingResults{measures,  logits,   stats,     grad_weight, grad_scale, grad_bias,
                              g.weight1, g.bias1,  g.gain1,   g.shift1,    g.weight2,  g.bias2,
                              g.gain2,   g.shift2, g.weight3, g.bias3};
  });
}

Tensor synthetic_gradient_mlp(const Tensor& logits, const Tensor& weight1, const Tensor& bias1,
                              const Tensor& gain1, const Tensor& shift1, const Tensor& weight2,
                              const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
                              const Tensor& weight3, const Tensor& bias3, const Optional& running) {
  require(logits.dim() == 3, "logits must be [T, Q, N]");
  return with_type(weight1, [&](auto zero) {
    using C = decltype(zero);
    const MlpArguments<C> a(
        logits, {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running);
    const Sizes& s = a.problem.s;
    const Folded<C> mlp(a.parameters, s);
    Tensor out = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    over_tasks(s.T, mlp_work(s), [&](int64_t begin, int64_t end) {
      kernels<C>().mlp_forward(a.problem, mlp, data<C>(out), begin, end);
    });
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
    const MlpArguments<C> a(
        logits, {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3}, running);
    const Sizes& s = a.problem.s;
    const Parameter<C> gg(a.on, grad_out, {s.T, s.Q, s.N}, "grad_out");
    const Folded<C> mlp(a.parameters, s);
    Tensor grad_logits = empty({s.T, s.Q, s.N}, kType<C>, a.on);
    const MlpGradTensors g(s, kType<C>, a.on);
    const auto sums = sum_over_tasks<C>(
        s.T, 3 * mlp_work(s), size_of<FoldedMlpGrad<C>, C>(s), [&](C* partial, int64_t begin, int64_t end) {
          Arena<C> arena(partial);
          const FoldedMlpGrad<C> grad(arena, s);
          kernels<C>().mlp_backward(a.problem, mlp, gg, data<C>(grad_logits), grad, begin, end);
        });
    Arena<C> arena(sums.get());
    unfold_into<C>(g, a.parameters, FoldedMlpGrad<C>(arena, s), s);
    return MlpGradients{grad_logits, g.weight1, g.bias1,  g.gain1,   g.shift1, g.weight2,
                        g.bias2,     g.gain2,   g.shift2, g.weight3, g.bias3};
  });
}

Tensor class_means(const Tensor& support, const Tensor& labels, const Optional& weight, int64_t n_way) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    const ClassLists classes(a.labels.get(), s.T, s.S, s.N);
    a.problem.classes = classes.table();
    Tensor theta0 = empty({s.T, s.N, s.D}, kType<C>, a.on);
    over_tasks(s.T, class_means_work(s), [&](int64_t begin, int64_t end) {
      kernels<C>().class_means_forward(a.problem, data<C>(theta0), begin, end);
    });
    return theta0;
  };
  return support.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> class_means_backward(const Tensor& grad_theta0, const Tensor& support,
                                                const Tensor& labels, const Optional& weight, int64_t n_way,
                                                bool need_support) {
  return with_type(grad_theta0, [&](auto zero) {
    using C = decltype(zero);
    ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    const ClassLists classes(a.labels.get(), s.T, s.S, s.N);
    a.problem.classes = classes.table();
    const Parameter<C> g(a.on, grad_theta0, {s.T, s.N, s.D}, "grad_theta0");
    const std::vector<int64_t> none{0};
    Tensor grad_support = empty(need_support ? std::vector{s.T, s.S, s.D} : none, kType<C>, a.on);
    Tensor grad_weight = empty(weight ? std::vector{s.D} : none, kType<C>, a.on);
    const auto sums = sum_over_tasks<C>(
        s.T, 2 * class_means_work(s), weight ? s.D : 0, [&](C* partial, int64_t begin, int64_t end) {
          kernels<C>().class_means_backward(a.problem, g, need_support ? data<C>(grad_support) : nullptr,
                                            weight ? partial : nullptr, begin, end);
        });
    if (weight) std::copy(sums.get(), sums.get() + s.D, data<C>(grad_weight));
    return std::tuple{grad_support, grad_weight};
  });
}

int64_t linear_head_work(const Sizes& s) {
  return s.D * (s.S * s.S / 2 + (2 * s.S + s.Q) * s.N) + s.K * s.N * s.S * (s.S + 20);
}

std::tuple<Tensor, Tensor, Tensor> linear_head(const Tensor& support, const Optional& support_index,
                                               const Tensor& labels, const Tensor& query,
                                               const Optional& query_index, const Tensor& weight,
                                               const Tensor& bias, const Tensor& rates, int64_t oracle,
                                               bool first_order, bool return_weights, bool save_trace) {
  return with_type(weight, [&](auto zero) {
    using C = decltype(zero);
    const HeadArguments<C> a(support, support_index, labels, query, query_index, weight, bias, rates, oracle,
                             first_order);
    const Sizes& s = a.problem.s;
    const std::vector<int64_t> none{0};
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>);
    Tensor heads = empty(return_weights ? std::vector{s.T, s.N, s.D + 1} : none, kType<C>);
    Tensor trace = empty_trace<C>(save_trace ? std::vector{s.T, head_trace_size<C>(s)} : none);
    const HeadForward<C> run{a.problem, data<C>(logits), return_weights ? data<C>(heads) : nullptr,
                             save_trace ? data<C>(trace) : nullptr};
    over_tasks(s.T, linear_head_work(s),
               [&](int64_t begin, int64_t end) { kernels<C>().linear_head_forward(run, begin, end); });
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
    const HeadArguments<C> a(support, support_index, labels, query, query_index, weight, bias, rates, oracle,
                             first_order);
    const Sizes& s = a.problem.s;
    const HeadBackwardArguments<C> b(a, grad_logits, grad_heads, trace, need_support, need_query);
    const auto sums = sum_over_tasks<C>(s.T, 2 * linear_head_work(s), size_of<HeadParameterGrad<C>, C>(s),
                                        [&](C* partial, int64_t begin, int64_t end) {
                                          Arena<C> arena(partial);
                                          kernels<C>().linear_head_backward(
                                              b.run, HeadParameterGrad<C>(arena, s), begin, end);
                                        });
    Arena<C> arena(sums.get());
    const HeadParameterGrad<C> total(arena, s);
    std::copy(total.weight, total.weight + s.N * s.D, data<C>(b.grad_weight));
    std::copy(total.bias, total.bias + s.N, data<C>(b.grad_bias));
    std::copy(total.rates, total.rates + s.K, data<C>(b.grad_rates));
    return HeadGradients{b.results()};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_head_gradients(
    const Tensor& support, const Optional& support_index, const Tensor& labels, const Tensor& query,
    const Optional& query_index, const Tensor& weight, const Tensor& bias, const Tensor& rates,
    int64_t oracle, bool first_order, const Tensor& query_labels) {
  return with_type(weight, [&](auto zero) {
    using C = decltype(zero);
    using Sums = typename HeadTraining<C>::Sums;
    const HeadArguments<C> a(support, support_index, labels, query, query_index, weight, bias, rates, oracle,
                             first_order);
    const Sizes& s = a.problem.s;
    const Labels answers(a.on, query_labels, s.T, s.Q, "query_labels");
    answers.require_below(s.N);
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>), measures = empty({2}, kType<C>);
    Tensor grad_weight = empty({s.N, s.D}, kType<C>), grad_bias = empty({s.N}, kType<C>);
    Tensor grad_rates = empty({s.K}, kType<C>);
    const HeadTraining<C> run{
        {a.problem, data<C>(logits), nullptr, nullptr}, answers.get(), C(1) / C(s.T * s.Q)};
    const auto sums = sum_over_tasks<C>(s.T, 3 * linear_head_work(s), size_of<Sums, C>(s),
                                        [&](C* partial, int64_t begin, int64_t end) {
                                          Arena<C> arena(partial);
                                          kernels<C>().linear_head_training(run, Sums(arena, s), begin, end);
                                        });
    Arena<C> arena(sums.get());
    const Sums total(arena, s);
    std::copy(total.grad.weight, total.grad.weight + s.N * s.D, data<C>(grad_weight));
    std::copy(total.grad.bias, total.grad.bias + s.N, data<C>(grad_bias));
    std::copy(total.grad.rates, total.grad.rates + s.K, data<C>(grad_rates));
    for (int64_t i = 0; i < 2; ++i) data<C>(measures)[i] = total.measures[i] * run.share;
    return std::tuple{measures, logits, grad_weight, grad_bias, grad_rates};
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("sib", TORCH_BOX(&sib));
  library.impl("sib_backward", TORCH_BOX(&sib_backward));
  library.impl("sib_gradients", TORCH_BOX(&sib_gradients));
  library.impl("synthetic_gradient_mlp", TORCH_BOX(&synthetic_gradient_mlp));
  library.impl("synthetic_gradient_mlp_backward", TORCH_BOX(&synthetic_gradient_mlp_backward));
  library.impl("class_means", TORCH_BOX(&class_means));
  library.impl("class_means_backward", TORCH_BOX(&class_means_backward));
  library.impl("linear_head", TORCH_BOX(&linear_head));
  library.impl("linear_head_backward", TORCH_BOX(&linear_head_backward));
  library.impl("linear_head_gradients", TORCH_BOX(&linear_head_gradients));
}

}  // namespace
