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

// The arguments and what a call makes ready: classes, where each task's trace begins, and who works on it.
template <class C>
struct PreparedRidge : RidgeArguments<C> {
  using RidgeArguments<C>::problem;
  RaggedClassLists classes;
  std::vector<int64_t> trace_offsets{0};
  TaskChunks chunks;

  template <class... Args>
  explicit PreparedRidge(const Args&... args)
      : RidgeArguments<C>(args...), classes(this->labels, this->support, problem.N) {
    problem.classes = classes.with(problem.classes);
    const RidgeProblem<C> known = this->on_host();
    std::vector<int64_t> work;
    for (int64_t t = 0; t < problem.T; ++t) {
      const Sizes s = known.sizes(t);
      trace_offsets.push_back(trace_offsets.back() + ridge_trace_size<C>(s));
      work.push_back(s.S * (s.S / 2 + s.Q) * s.D + s.S * s.S * s.S / 3 + s.S * s.N * (s.S + s.Q));
    }
    chunks = TaskChunks(work);
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
    const PreparedRidge<C> a(query, query_index, support, support_index, labels, support_offsets,
                             query_offsets, n_ways, max_support, max_query, lambda, scale, bias, n_way);
    Tensor logits = empty(a.query.shape(n_way), kType<C>);
    Tensor coefficients = empty(a.support.shape(n_way), kType<C>);
    Tensor trace = empty_trace<C>({save_trace ? a.trace_offsets.back() : 0});
    const std::unique_ptr<bool[]> singular(new bool[size_t(a.problem.T)]());
    const RidgeForward<C> run{a.problem, data<C>(logits), data<C>(coefficients),
                              save_trace ? data<C>(trace) : nullptr};
    over_chunks(a.chunks, 1, [&](int64_t begin, int64_t end) {
      ridge_kernels<C>().forward(run, a.trace_offsets.data(), singular.get(), begin, end);
    });
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
    const Tensor& lambda, const Tensor& scale, const Tensor& bias, int64_t n_way, int64_t max_support,
    int64_t max_query, bool need_query, bool need_support) {
  return with_type(scale, [&](auto zero) {
    using C = decltype(zero);
    const PreparedRidge<C> a(query, query_index, support, support_index, labels, support_offsets,
                             query_offsets, n_ways, max_support, max_query, lambda, scale, bias, n_way);
    const RidgeBackwardArguments<C> b(a, grad_logits, grad_coefficients, trace, a.trace_offsets.back(),
                                      lambda, scale, bias, need_query, need_support);
    const auto sums = sum_over_chunks<C>(
        a.chunks, 2, size_of<RidgeGrad<C>, C>(), [&](C* partial, int64_t begin, int64_t end) {
          Arena<C> arena(partial);
          ridge_kernels<C>().backward(b.run, a.trace_offsets.data(), RidgeGrad<C>(arena), begin, end);
        });
    Arena<C> arena(sums.get());
    const RidgeGrad<C> total(arena);
    *data<C>(b.grad_lambda) = *total.lambda;
    *data<C>(b.grad_scale) = *total.scale;
    *data<C>(b.grad_bias) = *total.bias;
    return b.results();
  });
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("ridge", TORCH_BOX(&ridge));
  library.impl("ridge_backward", TORCH_BOX(&ridge_backward));
}

}  // namespace
