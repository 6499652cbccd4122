// The CPU implementation of torch.ops.kernelmeta.program; its schema stands in kernelmeta/ops/program_op.py.
#include <tuple>

#include "cpu/op_support.h"
#include "cpu/ragged_arguments.h"

namespace {

template <class C>
const ProgramKernels<C>& program_kernels() {
  if constexpr (sizeof(C) == 4)
    return kernel_table().program_f32;
  else
    return kernel_table().program_f64;
}

// [oracle, of query rows, mean, steps] of every phase, one after the other.
std::vector<Phase> phases_of(const std::vector<int64_t>& numbers, bool cosine, bool has_mlp) {
  require(numbers.size() % 4 == 0, "phases: expected four numbers a phase");
  std::vector<Phase> phases;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const auto oracle = Oracle(numbers[i]);
    const bool query = numbers[i + 1] != 0;
    require(numbers[i] >= 0 && numbers[i] < kOracles, "phases: unknown oracle");
    require(numbers[i + 3] >= 0, "phases: steps must not be negative");
    require(!query || !needs_labels(oracle), "phases: query rows have no labels");
    require(oracle != Oracle::kSoftAssignment || (cosine && query),
            "phases: soft assignment needs a cosine classifier and query rows");
    require(oracle != Oracle::kSyntheticGradient || has_mlp, "phases: a synthetic gradient needs its MLP");
    if (numbers[i + 3] > 0) phases.push_back({oracle, query, numbers[i + 2] != 0, numbers[i + 3]});
  }
  return phases;
}

using MlpOptionals = std::array<const Optional*, 10>;

// Arguments that program and its backward share.
template <class C>
struct ProgramArguments {
  TaskRowTensor support, query;
  ProgramProblem<C> problem;
  std::vector<Phase> phases;
  std::optional<RaggedClassLists> classes;
  std::optional<Parameter<C>> theta0, weight, scale, bias, target, rates;
  std::optional<FoldedParameters<C>> mlp;
  std::vector<int64_t> trace_offsets;
  TaskChunks chunks;

  ProgramArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& support_rows,
                   const Optional& support_index, const Tensor& labels, const Optional& support_offsets,
                   const Optional& query_offsets, const Optional& n_ways, const Optional& theta0_tensor,
                   const Optional& weight_tensor, const Optional& scale_tensor, const Optional& bias_tensor,
                   const Optional& target_tensor, const Tensor& rates_tensor, const MlpOptionals& m,
                   const Optional& running, int64_t n_way, const std::vector<int64_t>& phase_numbers,
                   bool cosine, int64_t start, bool first_order, bool coefficients)
      : support(support_rows, support_index, support_offsets, "support"),
        query(query_rows, query_index, query_offsets, "query") {
    const int64_t T = query.T(), D = query.D, N = n_way;
    require(support.T() == T && support.D == D, "support and query must have the same T and D");
    require(N >= 1 && D >= 1, "ways and features: at least one each");
    require(start >= 0 && start <= 2, "start must be 0, 1 or 2");
    require(!cosine || start != 2, "a cosine classifier cannot start at zero");
    require(!first_order || !cosine, "first_order is for linear classifiers");
    require_storage<C>(support, query);
    for (int64_t t = 0; t < T; ++t) {
      if (query.rows.count(t) < 1)
        refuse("query: task " + std::to_string(t) + " has no row; every task needs one");
    }
    classes.emplace(labels, support, n_ways, N);

    problem = {};
    problem.start = Start(start);
    if (start == 1) {
      require(theta0_tensor.has_value(), "a learned start needs theta0");
      theta0.emplace(*theta0_tensor, std::initializer_list<int64_t>{N, D}, "theta0");
      problem.theta0 = *theta0;
    }
    if (start == 0 && weight_tensor) {
      weight.emplace(*weight_tensor, std::initializer_list<int64_t>{D}, "weight");
      problem.weight = *weight;
    }
    const auto value = [](std::optional<Parameter<C>>& held, const Optional& t, C otherwise,
                          const char* name) {
      if (!t) return otherwise;
      require(t->numel() == 1, "scale, target_scale and a cosine classifier's bias: expected one value");
      held.emplace(*t, name);
      return **held;
    };
    problem.scale = value(scale, cosine ? scale_tensor : Optional(), C(1), "scale");
    problem.target = value(target, target_tensor, C(1), "target_scale");
    if (cosine) {
      problem.bias = value(bias, bias_tensor, C(0), "bias");
    } else if (bias_tensor) {
      bias.emplace(*bias_tensor, std::initializer_list<int64_t>{N}, "bias");
      problem.start_bias = *bias;
    }
    if (*m[0]) {
      for (const Optional* tensor : m) require(tensor->has_value(), "mlp: all ten tensors or none");
      const int64_t H = (*m[0])->size(0);
      require(H >= 1, "hidden units: at least one");
      mlp.emplace(MlpTensors{**m[0], **m[1], **m[2], **m[3], **m[4], **m[5], **m[6], **m[7], **m[8], **m[9]},
                  running, Sizes{1, 1, 1, N, D, H, 0});
      problem.H = H;
      problem.mlp = mlp->folded;
    }
    phases = phases_of(phase_numbers, cosine, mlp.has_value());
    for (const Phase& phase : phases) problem.K += phase.steps;
    rates.emplace(rates_tensor, std::initializer_list<int64_t>{problem.K}, "rates");

    problem.T = T;
    problem.N = N;
    problem.D = D;
    problem.phases = phases.data();
    problem.n_phases = int64_t(phases.size());
    problem.cosine = cosine;
    problem.coefficients = coefficients;
    problem.first_order = first_order;
    problem.support = support.rows;
    problem.query = query.rows;
    problem.ways = classes->ways();
    problem.members = classes->members();
    problem.class_offsets = classes->offsets();
    problem.rates = *rates;
    lay_out();
  }
  ProgramArguments(const ProgramArguments&) = delete;

 private:
  // Where each task's trace begins, and who works on it.
  void lay_out() {
    std::vector<int64_t> work;
    trace_offsets.push_back(0);
    for (int64_t t = 0; t < problem.T; ++t) {
      trace_offsets.push_back(trace_offsets.back() + program_kernels<C>().trace_size(problem, t));
      work.push_back(task_work(problem.shape(t)));
    }
    problem.trace_offsets = trace_offsets.data();
    chunks = TaskChunks(work);
  }

  int64_t task_work(const ProgramShape& s) const {
    const int64_t live = s.support().count + s.Q;
    int64_t multiplications = s.N * live * s.D;
    if (s.uses_support) multiplications += s.S * (s.S / 2 + s.Q) * s.D;
    if (s.uses_query) multiplications += s.Q * s.Q / 2 * s.D;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      const int64_t rows = s.part(phase.query).count;
      int64_t step = rows * s.N * (live + 20);
      if (phase.oracle == Oracle::kSyntheticGradient) step += rows * s.H * (2 * s.N + s.H);
      multiplications += phase.steps * step;
    }
    return multiplications;
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
                       int64_t start, bool first_order, bool coefficients, bool save_trace) {
  return with_type(rates, [&](auto zero) {
    using C = decltype(zero);
    const ProgramArguments<C> a(
        query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways, theta0,
        weight, scale, bias, target, rates,
        {&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3}, running,
        n_way, phases, cosine, start, first_order, coefficients);
    const auto type = kType<C>;
    const std::vector<int64_t> none{0};
    Tensor logits = empty(a.query.shape(n_way), type);
    Tensor of_support = empty(coefficients ? a.support.shape(n_way) : none, type);
    Tensor of_query = empty(coefficients ? a.query.shape(n_way) : none, type);
    Tensor of_start = empty(coefficients ? std::vector{a.problem.T, n_way} : none, type);
    Tensor trace = empty_trace<C>({save_trace ? a.trace_offsets.back() : 0});
    ProgramForward<C> run{a.problem, data<C>(logits), nullptr,
                          nullptr,   nullptr,         save_trace ? data<C>(trace) : nullptr};
    if (coefficients) {
      run.support_coefficients = data<C>(of_support);
      run.query_coefficients = data<C>(of_query);
      run.start_coefficients = data<C>(of_start);
    }
    over_chunks(a.chunks, 1,
                [&](int64_t begin, int64_t end) { program_kernels<C>().forward(run, begin, end); });
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
                                  bool first_order, bool coefficients, bool need_query, bool need_support) {
  return with_type(rates, [&](auto zero) {
    using C = decltype(zero);
    const ProgramArguments<C> a(
        query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways, theta0,
        weight, scale, bias, target, rates,
        {&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3}, running,
        n_way, phases, cosine, start, first_order, coefficients);
    const ProgramProblem<C>& p = a.problem;
    const auto type = kType<C>;
    const std::vector<int64_t> none{0};
    const Parameter<C> gz(grad_logits, a.query.shape(n_way), "grad_logits");
    const Parameter<C> saved(trace, {a.trace_offsets.back()}, "trace");
    std::optional<Parameter<C>> gs, gq, g0;
    if (grad_of_start) {
      require(coefficients && grad_of_support && grad_of_query,
              "gradients of coefficients: all three or none");
      gs.emplace(*grad_of_support, a.support.shape(n_way), "grad_support_coefficients");
      gq.emplace(*grad_of_query, a.query.shape(n_way), "grad_query_coefficients");
      g0.emplace(*grad_of_start, std::vector{p.T, n_way}, "grad_start_coefficients");
    }
    Tensor grad_query = empty(need_query ? a.query.shape(p.D) : none, type);
    Tensor grad_support = empty(need_support ? a.support.shape(p.D) : none, type);
    const ProgramBackward<C> run{p,
                                 saved,
                                 gz,
                                 gs ? gs->get() : nullptr,
                                 gq ? gq->get() : nullptr,
                                 g0 ? g0->get() : nullptr,
                                 need_support ? data<C>(grad_support) : nullptr,
                                 need_query ? data<C>(grad_query) : nullptr};
    const auto sums = sum_over_chunks<C>(
        a.chunks, 3, size_of<ProgramGrad<C>, C>(p), [&](C* partial, int64_t begin, int64_t end) {
          Arena<C> arena(partial);
          program_kernels<C>().backward(run, ProgramGrad<C>(arena, p), begin, end);
        });
    Arena<C> arena(sums.get());
    const ProgramGrad<C> total(arena, p);
    const auto out = [&](const C* from, const Optional& like, bool used) {
      if (!like) return empty(none, type);
      Tensor result = empty(sizes(*like), type);
      if (used)
        std::copy(from, from + like->numel(), data<C>(result));
      else
        std::fill(data<C>(result), data<C>(result) + like->numel(), C(0));
      return result;
    };
    const MlpGradTensors g(Sizes{1, 1, 1, p.H ? p.N : 0, p.D, p.H, p.K}, type);
    if (a.mlp) unfold_into<C>(g, a.mlp->parameters, total.mlp, Sizes{1, 1, 1, p.N, p.D, p.H, p.K});
    return ProgramGradients{grad_query,
                            grad_support,
                            out(total.theta0, theta0, p.start == Start::kLearned),
                            out(total.weight, weight, p.weight != nullptr),
                            out(total.scale, scale, cosine),
                            out(cosine ? total.bias : total.start_bias, bias, true),
                            out(total.target, target, true),
                            out(total.rates, rates, true),
                            g.weight1,
                            g.bias1,
                            g.gain1,
                            g.shift1,
                            g.weight2,
                            g.bias2,
                            g.gain2,
                            g.shift2,
                            g.weight3,
                            g.bias3};
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("program", TORCH_BOX(&program));
  library.impl("program_backward", TORCH_BOX(&program_backward));
}

}  // namespace
