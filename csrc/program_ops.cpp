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

// The arguments and what a call makes ready: classes, the MLP folded, where each task's trace begins, and who
// works on it.
template <class C>
struct PreparedProgram : ProgramArguments<C> {
  using ProgramArguments<C>::problem, ProgramArguments<C>::phases, ProgramArguments<C>::mlp;
  RaggedClassLists classes;
  std::optional<Folded<C>> folded;
  std::vector<int64_t> trace_offsets{0};
  TaskChunks chunks;
  ProgramCall<C> call{};

  template <class... Args>
  explicit PreparedProgram(const Args&... args)
      : ProgramArguments<C>(args...), classes(this->labels, this->support, problem.N) {
    problem.classes = classes.with(problem.classes);
    if (mlp) folded.emplace(*mlp, this->sizes());
    const ProgramProblem<C> known = this->on_host();
    std::vector<int64_t> work;
    for (int64_t t = 0; t < problem.T; ++t) {
      const ProgramShape s = known.shape(t, phases.data());
      trace_offsets.push_back(trace_offsets.back() + program_trace_size(problem, s));
      work.push_back(task_work(s));
    }
    chunks = TaskChunks(work);
    call = {phases.data(), folded ? static_cast<const FoldedMlp<C>&>(*folded) : FoldedMlp<C>{},
            trace_offsets.data()};
  }

 private:
  static int64_t task_work(const ProgramShape& s) {
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
                       int64_t start, bool first_order, bool coefficients, int64_t max_support,
                       int64_t max_query, bool save_trace) {
  return with_type(rates, [&](auto zero) {
    using C = decltype(zero);
    const PreparedProgram<C> a(
        query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways,
        max_support, max_query, theta0, weight, scale, bias, target, rates,
        MlpOptionals{&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3},
        running, n_way, phases, cosine, start, first_order, coefficients);
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
                [&](int64_t begin, int64_t end) { program_kernels<C>().forward(run, a.call, begin, end); });
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
    const PreparedProgram<C> a(
        query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways,
        max_support, max_query, theta0, weight, scale, bias, target, rates,
        MlpOptionals{&weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3},
        running, n_way, phases, cosine, start, first_order, coefficients);
    const ProgramProblem<C>& p = a.problem;
    const auto type = kType<C>;
    const std::vector<int64_t> none{0};
    const ProgramBackwardArguments<C> b(a, grad_logits, grad_of_support, grad_of_query, grad_of_start, trace,
                                        a.trace_offsets.back(), need_query, need_support);
    const auto sums = sum_over_chunks<C>(
        a.chunks, 3, size_of<ProgramGrad<C>, C>(p), [&](C* partial, int64_t begin, int64_t end) {
          Arena<C> arena(partial);
          program_kernels<C>().backward(b.run, a.call, ProgramGrad<C>(arena, p), begin, end);
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
    const MlpGradTensors g(a.sizes(), type);
    if (a.mlp) unfold_into<C>(g, *a.mlp, total.mlp, a.sizes());
    return ProgramGradients{b.grad_query,
                            b.grad_support,
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
