// The CPU implementations of torch.ops.kernelmeta.*: tensors in, kernels over tasks, tensors out.
// Schemas stand in kernelmeta/ops beside the fake kernels and the derivatives. Only PyTorch's stable ABI is
// used.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "arguments.h"
#include "cpu/class_lists.h"
#include "cpu/kernel_table.h"
#include "engine/serial_block.h"

namespace {

template <class C>
const Kernels<C>& kernels() {
  if constexpr (sizeof(C) == 4)
    return kernel_table().f32;
  else
    return kernel_table().f64;
}

// Multiplications that one task takes, roughly.
int64_t mlp_work(const Sizes& s) { return s.Q * s.H * (2 * s.N + s.H); }
int64_t sib_work(const Sizes& s) {
  return s.Q * s.D * std::min(s.Q / 2, 4 * s.K * s.N) + s.Q * s.N * s.D +
         s.K * (mlp_work(s) + s.Q * s.Q * s.N);
}
int64_t class_means_work(const Sizes& s) { return (2 * s.S + s.N) * s.D; }

// How many items a thread must get before a second one is worth waking: some 20 us of work.
int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, 1'000'000 / std::max<int64_t>(work_per_item, 1));
}

template <class F>
void over_tasks(int64_t T, int64_t work, F f) {
  torch::stable::parallel_for(0, T, grain(work), f);
}

// f(partial, begin, end) adds the sums over a chunk of tasks to `partial`; the totals are returned. Chunks
// depend on T alone and are added in order: the bits do not depend on the number of threads.
template <class C, class F>
std::unique_ptr<C[]> sum_over_tasks(int64_t T, int64_t work, int64_t size, F f) {
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(T, 32));
  std::unique_ptr<C[]> sums(new C[size_t(size * chunks)]());
  torch::stable::parallel_for(0, chunks, grain(work * T / chunks), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(sums.get() + c * size, c * T / chunks, (c + 1) * T / chunks);
  });
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[c * size + i];
  }
  return sums;
}

// Statistics of every task, averaged in the order of the tasks into `out`.
template <class C>
void average(const C* per_task, int64_t T, int64_t size, C* out) {
  for (int64_t i = 0; i < size; ++i) {
    C sum = 0;
    for (int64_t t = 0; t < T; ++t) sum += per_task[t * size + i];
    out[i] = sum / C(T);
  }
}

// The MLP with gain and shift folded in, once a call.
template <class C>
class Folded {
 public:
  Folded(const MlpParameters<C>& p, const Sizes& s)
      : memory_(new C[size_t(size_of<FoldedMlp<C>, C>(s, p.running() != nullptr))]),
        arena_(memory_.get()),
        mlp_(arena_, s, p.running() != nullptr) {
    SerialBlock<C> block;
    fold(block, p.arrays(), p.running(), s, mlp_);
  }
  operator const FoldedMlp<C>&() const { return mlp_; }

 private:
  std::unique_ptr<C[]> memory_;
  Arena<C> arena_;
  FoldedMlp<C> mlp_;
};

template <class C>
void unfold_into(const MlpGradTensors& to, const MlpParameters<C>& p, const FoldedMlpGrad<C>& folded,
                 const Sizes& s) {
  SerialBlock<C> block;
  unfold(block, p.arrays(), folded, s, to.arrays<C>());
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
    Tensor trace =
        empty(save_trace ? std::vector{s.T, trace_size<C>(s, return_weights)} : none, kType<C>, a.on);
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

Tensor class_means(const Tensor& support, const Tensor& labels, int64_t n_way, const Optional& weight) {
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
                                                const Tensor& labels, int64_t n_way, const Optional& weight,
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

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  library.impl("sib", TORCH_BOX(&sib));
  library.impl("sib_backward", TORCH_BOX(&sib_backward));
  library.impl("synthetic_gradient_mlp", TORCH_BOX(&synthetic_gradient_mlp));
  library.impl("synthetic_gradient_mlp_backward", TORCH_BOX(&synthetic_gradient_mlp_backward));
  library.impl("class_means", TORCH_BOX(&class_means));
  library.impl("class_means_backward", TORCH_BOX(&class_means_backward));
}

}  // namespace
