// The CPU implementation of torch.ops.kernelmeta.ridge; its schema stands in kernelmeta/ops/ridge_op.py.
#include <tuple>

#include "cpu/op_support.h"
#include "cpu/ragged_arguments.h"

namespace {

template <class C>
const RidgeKernels<C>& ridge_kernels() {
  if constexpr (sizeof(C) == 4)
    return kernel_table().ridge_f32;
  else
    return kernel_table().ridge_f64;
}

// Arguments that ridge and its backward share.
template <class C>
struct RidgeArguments {
  TaskRowTensor support, query;
  RaggedClassLists classes;
  RidgeProblem<C> problem;
  std::vector<int64_t> trace_offsets;
  TaskChunks chunks;

  RidgeArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& support_rows,
                 const Optional& support_index, const Tensor& labels, const Optional& support_offsets,
                 const Optional& query_offsets, const Optional& n_ways, const Tensor& lambda,
                 const Tensor& scale, const Tensor& bias, int64_t n_way)
      : support(support_rows, support_index, support_offsets, "support"),
        query(query_rows, query_index, query_offsets, "query"),
        classes(labels, support, n_ways, n_way) {
    require(support.T() == query.T() && support.D == query.D, "support and query must have the same T and D");
    require(n_way >= 1 && query.D >= 1, "ways and features: at least one each");
    require_storage<C>(support, query);
    const char* complaint = "regularization, scale and bias must be one value each, of one dtype";
    problem = {query.T(),
               n_way,
               query.D,
               support.rows,
               query.rows,
               classes.ways(),
               classes.members(),
               classes.offsets(),
               *one_value<C>(Place(), lambda, complaint),
               *one_value<C>(Place(), scale, complaint),
               *one_value<C>(Place(), bias, complaint),
               nullptr};
    trace_offsets.push_back(0);
    std::vector<int64_t> work;
    for (int64_t t = 0; t < problem.T; ++t) {
      const Sizes s = problem.sizes(t);
      if (s.Q < 1) refuse("query: task " + std::to_string(t) + " has no row; every task needs one");
      trace_offsets.push_back(trace_offsets.back() + ridge_kernels<C>().trace_size(problem, t));
      work.push_back(s.S * (s.S / 2 + s.Q) * s.D + s.S * s.S * s.S / 3 + s.S * s.N * (s.S + s.Q));
    }
    problem.trace_offsets = trace_offsets.data();
    chunks = TaskChunks(work);
  }
  RidgeArguments(const RidgeArguments&) = delete;
};

std::tuple<Tensor, Tensor, Tensor> ridge(const Tensor& query, const Optional& query_index,
                                         const Tensor& support, const Optional& support_index,
                                         const Tensor& labels, const Optional& support_offsets,
                                         const Optional& query_offsets, const Optional& n_ways,
                                         const Tensor& lambda, const Tensor& scale, const Tensor& bias,
                                         int64_t n_way, bool save_trace) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const RidgeArguments<C> a(query, query_index, support, support_index, labels, support_offsets,
                              query_offsets, n_ways, lambda, scale, bias, n_way);
    Tensor logits = empty(a.query.shape(n_way), kType<C>);
    Tensor coefficients = empty(a.support.shape(n_way), kType<C>);
    Tensor trace = empty_trace<C>({save_trace ? a.trace_offsets.back() : 0});
    const std::unique_ptr<bool[]> singular(new bool[size_t(a.problem.T)]());
    const RidgeForward<C> run{a.problem, data<C>(logits), data<C>(coefficients),
                              save_trace ? data<C>(trace) : nullptr, singular.get()};
    over_chunks(a.chunks, 1,
                [&](int64_t begin, int64_t end) { ridge_kernels<C>().forward(run, begin, end); });
    for (int64_t t = 0; t < a.problem.T; ++t) {
      if (!singular[size_t(t)]) continue;
      refuse(
          "ridge: the system of task " + std::to_string(t) +
          " is singular; a larger regularization, or fewer support rows that repeat each other, would help");
    }
    return std::tuple{logits, coefficients, trace};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ridge_backward(
    const Tensor& grad_logits, const Optional& grad_coefficients, const Tensor& trace, const Tensor& query,
    const Optional& query_index, const Tensor& support, const Optional& support_index, const Tensor& labels,
    const Optional& support_offsets, const Optional& query_offsets, const Optional& n_ways,
    const Tensor& lambda, const Tensor& scale, const Tensor& bias, int64_t n_way, bool need_query,
    bool need_support) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const RidgeArguments<C> a(query, query_index, support, support_index, labels, support_offsets,
                              query_offsets, n_ways, lambda, scale, bias, n_way);
    const Parameter<C> gz(grad_logits, a.query.shape(n_way), "grad_logits");
    const Parameter<C> saved(trace, {a.trace_offsets.back()}, "trace");
    std::optional<Parameter<C>> gc;
    if (grad_coefficients) gc.emplace(*grad_coefficients, a.support.shape(n_way), "grad_coefficients");
    const std::vector<int64_t> none{0};
    Tensor grad_query = empty(need_query ? a.query.shape(a.problem.D) : none, kType<C>);
    Tensor grad_support = empty(need_support ? a.support.shape(a.problem.D) : none, kType<C>);
    const RidgeBackward<C> run{a.problem,
                               saved,
                               gz,
                               gc ? gc->get() : nullptr,
                               need_support ? data<C>(grad_support) : nullptr,
                               need_query ? data<C>(grad_query) : nullptr};
    const auto sums = sum_over_chunks<C>(a.chunks, 2, size_of<RidgeGrad<C>, C>(),
                                         [&](C* partial, int64_t begin, int64_t end) {
                                           Arena<C> arena(partial);
                                           ridge_kernels<C>().backward(run, RidgeGrad<C>(arena), begin, end);
                                         });
    Arena<C> arena(sums.get());
    const RidgeGrad<C> total(arena);
    const auto one = [](const C* value, const Tensor& like) {
      Tensor result = empty(sizes(like), kType<C>);
      *data<C>(result) = *value;
      return result;
    };
    return std::tuple{grad_query, grad_support, one(total.lambda, lambda), one(total.scale, scale),
                      one(total.bias, bias)};
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("ridge", TORCH_BOX(&ridge));
  library.impl("ridge_backward", TORCH_BOX(&ridge_backward));
}

}  // namespace
