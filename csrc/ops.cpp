// The CPU implementations of torch.ops.kernelmeta.*: tensors in, kernels over tasks, tensors out.
// Schemas stand in kernelmeta/ops beside the fake kernels and the derivatives. Only PyTorch's stable ABI is
// used.
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

// Arguments that sib and its backward share.
template <class C>
struct SibArguments {
  FeatureTensor query, start;
  SibProblem<C> problem;
  std::optional<ClassLists> classes;
  std::optional<Parameter<C>> weight;
  FoldedParameters<C> mlp;

  SibArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& start_rows,
               const Optional& start_index, const Optional& labels, const Optional& weight_tensor,
               const Tensor& scale, const Tensor& bias, const MlpTensors& m, const Optional& running,
               int64_t steps, double lr, bool weights)
      : query(query_rows, query_index, "query"),
        start(start_rows, start_index, "support"),
        mlp(m, running, m.weight1.size(-1), m.weight1.size(0)) {
    Sizes s{query.T, start.features.rows, query.features.rows, m.weight1.size(-1), query.D, m.weight1.size(0),
            steps};
    require(start.T == s.T && start.D == s.D, "support and query must have the same T and D");
    require(steps >= 0, "steps must not be negative");
    require(s.N >= 1 && s.Q >= 1 && s.H >= 1 && s.D >= 1,
            "ways, query rows, hidden units and features: at least one each");
    if (labels) {
      classes.emplace(*labels, s.T, s.S, s.N);
      if (weight_tensor) weight.emplace(*weight_tensor, std::initializer_list<int64_t>{s.D}, "weight");
    } else {
      require(s.S == s.N, "without support_labels the start is theta0, [T, N, D]");
    }
    const Storage own = sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64;
    for (const FeatureTensor* f : {&query, &start}) {
      require(f->features.storage == own || (sizeof(C) == 4 && f->features.storage != Storage::kFloat64),
              "float64 features need float64 parameters, and float64 parameters float64 features");
    }
    problem = {s,
               query.features,
               start.features,
               classes ? classes->table() : ClassTable{nullptr, nullptr},
               weight ? weight->get() : nullptr,
               scalar<C>(scale, "scale must be one value, of the parameters' dtype"),
               scalar<C>(bias, "bias must be one value, of the parameters' dtype"),
               C(lr),
               mlp.folded,
               weights};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> sib(
    const Tensor& query, const Optional& query_index, const Tensor& start, const Optional& start_index,
    const Optional& labels, const Optional& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& weight1, const Tensor& bias1, const Tensor& gain1, const Tensor& shift1,
    const Tensor& weight2, const Tensor& bias2, const Tensor& gain2, const Tensor& shift2,
    const Tensor& weight3, const Tensor& bias3, const Optional& running, int64_t steps, double lr,
    bool return_weights, bool return_stats, bool save_trace) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const SibArguments<C> a(query, query_index, start, start_index, labels, weight, scale, bias,
                            {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3},
                            running, steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    const int64_t stats_size = s.K * 4 * s.H;
    Tensor logits = empty({s.T, s.Q, s.N}, kType<C>);
    Tensor weights = empty(return_weights ? std::vector{s.T, s.N, s.D} : std::vector<int64_t>{0}, kType<C>);
    Tensor stats =
        empty(return_stats ? std::vector<int64_t>{s.K, 2, 2, s.H} : std::vector<int64_t>{0}, kType<C>);
    Tensor trace = empty(
        save_trace ? std::vector{s.T, kernels<C>().trace_size(s, return_weights)} : std::vector<int64_t>{0},
        kType<C>);
    std::unique_ptr<C[]> task_stats;
    if (return_stats && s.T > 1) task_stats.reset(new C[size_t(s.T * stats_size)]);
    C* stats_out = !return_stats ? nullptr : task_stats ? task_stats.get() : data<C>(stats);
    const SibForward<C> run{a.problem, data<C>(logits), return_weights ? data<C>(weights) : nullptr,
                            stats_out, save_trace ? data<C>(trace) : nullptr};
    over_tasks(s.T, sib_work(s),
               [&](int64_t begin, int64_t end) { kernels<C>().sib_forward(run, begin, end); });
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
    const SibArguments<C> a(query, query_index, start, start_index, labels, weight, scale, bias,
                            {weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3},
                            running, steps, lr, return_weights);
    const Sizes& s = a.problem.s;
    const Parameter<C> gz(grad_logits, {s.T, s.Q, s.N}, "grad_logits");
    const Parameter<C> saved(trace, {s.T, kernels<C>().trace_size(s, return_weights)}, "trace");
    std::optional<Parameter<C>> gw;
    if (grad_weights) {
      require(return_weights, "grad_weights without return_weights");
      gw.emplace(*grad_weights, std::initializer_list<int64_t>{s.T, s.N, s.D}, "grad_weights");
    }
    const auto type = kType<C>;
    const std::vector<int64_t> none{0};
    Tensor grad_query = empty(need_query ? std::vector{s.T, s.Q, s.D} : none, type);
    Tensor grad_start = empty(need_start ? std::vector{s.T, s.S, s.D} : none, type);
    const bool from_support = a.problem.weight != nullptr;
    Tensor grad_weight = empty(from_support ? std::vector{s.D} : none, type);
    Tensor grad_scale = empty(sizes(scale), type);
    Tensor grad_bias = empty(sizes(bias), type);
    const MlpGradTensors g(s, type);
    const SibBackward<C> run{a.problem,
                             saved,
                             gz,
                             gw ? gw->get() : nullptr,
                             need_query ? data<C>(grad_query) : nullptr,
                             need_start ? data<C>(grad_start) : nullptr};
    const auto sums =
        sum_over_tasks<C>(s.T, 2 * sib_work(s), size_of<C, SibParameterGrad<C>>(s),
                          [&](C* partial, int64_t begin, int64_t end) {
                            Arena<C> arena(partial);
                            kernels<C>().sib_backward(run, SibParameterGrad<C>(arena, s), begin, end);
                          });
    Arena<C> arena(sums.get());
    const SibParameterGrad<C> total(arena, s);
    unfold<C>(a.mlp.arrays(), total.mlp, s, g.arrays<C>());
    *data<C>(grad_scale) = *total.scale;
    *data<C>(grad_bias) = *total.bias;
    if (from_support) std::copy(total.weight, total.weight + s.D, data<C>(grad_weight));
    return SibGradients{grad_query, grad_start, grad_weight, grad_scale, grad_bias,
                        g.weight1,  g.bias1,    g.gain1,     g.shift1,   g.weight2,
                        g.bias2,    g.gain2,    g.shift2,    g.weight3,  g.bias3};
  });
}

template <class C>
struct MlpArguments {
  FoldedParameters<C> parameters;
  Parameter<C> logits;
  MlpProblem<C> problem;

  MlpArguments(const Tensor& rows, const MlpTensors& m, const Optional& running)
      : parameters(m, running, m.weight1.size(-1), m.weight1.size(0)),
        logits(rows, {rows.size(0), rows.size(1), m.weight1.size(-1)}, "logits") {
    Sizes s{};
    s.T = rows.size(0);
    s.Q = rows.size(1);
    s.N = m.weight1.size(-1);
    s.H = m.weight1.size(0);
    require(s.Q >= 1 && s.N >= 1 && s.H >= 1, "rows, ways and hidden units: at least one each");
    problem = {s, parameters.folded, logits};
  }
};

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
    Tensor out = empty({s.T, s.Q, s.N}, kType<C>);
    over_tasks(s.T, mlp_work(s), [&](int64_t begin, int64_t end) {
      kernels<C>().mlp_forward(a.problem, data<C>(out), begin, end);
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
    const Parameter<C> gg(grad_out, {s.T, s.Q, s.N}, "grad_out");
    Tensor grad_logits = empty({s.T, s.Q, s.N}, kType<C>);
    const MlpGradTensors g(s, kType<C>);
    const auto sums = sum_over_tasks<C>(s.T, 3 * mlp_work(s), size_of<C, FoldedMlpGrad<C>>(s),
                                        [&](C* partial, int64_t begin, int64_t end) {
                                          Arena<C> arena(partial);
                                          kernels<C>().mlp_backward(a.problem, gg, data<C>(grad_logits),
                                                                    FoldedMlpGrad<C>(arena, s), begin, end);
                                        });
    Arena<C> arena(sums.get());
    unfold<C>(a.parameters.arrays(), FoldedMlpGrad<C>(arena, s), s, g.arrays<C>());
    return MlpGradients{grad_logits, g.weight1, g.bias1,  g.gain1,   g.shift1, g.weight2,
                        g.bias2,     g.gain2,   g.shift2, g.weight3, g.bias3};
  });
}

template <class C>
struct ClassMeansArguments {
  FeatureTensor support;
  ClassLists classes;
  std::optional<Parameter<C>> weight;
  ClassMeansProblem<C> problem;

  ClassMeansArguments(const Tensor& rows, const Tensor& labels, int64_t n_way, const Optional& weight_tensor)
      : support(rows, std::nullopt, "support"), classes(labels, support.T, support.features.rows, n_way) {
    Sizes s{};
    s.T = support.T;
    s.S = support.features.rows;
    s.N = n_way;
    s.D = support.D;
    require(s.N >= 1 && s.D >= 1, "ways and features: at least one each");
    if (weight_tensor) weight.emplace(*weight_tensor, std::initializer_list<int64_t>{s.D}, "weight");
    require((support.features.storage == Storage::kFloat64) == (sizeof(C) == 8),
            "float64 features need a float64 weight, and a float64 weight float64 features");
    problem = {s, support.features, classes.table(), weight ? weight->get() : nullptr};
  }
};

Tensor class_means(const Tensor& support, const Tensor& labels, const Optional& weight, int64_t n_way) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    Tensor theta0 = empty({s.T, s.N, s.D}, kType<C>);
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
    const ClassMeansArguments<C> a(support, labels, n_way, weight);
    const Sizes& s = a.problem.s;
    const Parameter<C> g(grad_theta0, {s.T, s.N, s.D}, "grad_theta0");
    const std::vector<int64_t> none{0};
    Tensor grad_support = empty(need_support ? std::vector{s.T, s.S, s.D} : none, kType<C>);
    Tensor grad_weight = empty(weight ? std::vector{s.D} : none, kType<C>);
    const auto sums = sum_over_tasks<C>(
        s.T, 2 * class_means_work(s), weight ? s.D : 0, [&](C* partial, int64_t begin, int64_t end) {
          kernels<C>().class_means_backward(a.problem, g, need_support ? data<C>(grad_support) : nullptr,
                                            weight ? partial : nullptr, begin, end);
        });
    if (weight) std::copy(sums.get(), sums.get() + s.D, data<C>(grad_weight));
    return std::tuple{grad_support, grad_weight};
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("sib", TORCH_BOX(&sib));
  library.impl("sib_backward", TORCH_BOX(&sib_backward));
  library.impl("synthetic_gradient_mlp", TORCH_BOX(&synthetic_gradient_mlp));
  library.impl("synthetic_gradient_mlp_backward", TORCH_BOX(&synthetic_gradient_mlp_backward));
  library.impl("class_means", TORCH_BOX(&class_means));
  library.impl("class_means_backward", TORCH_BOX(&class_means_backward));
}

}  // namespace
