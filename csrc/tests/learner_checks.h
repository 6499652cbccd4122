// Kernels of the other learners (csrc/cpu/kernel_table.h), double and float, against those of a table that is
// taken for right: it is compared with PyTorch by tests/ops.
#pragma once

#include "tests/distillation_checks.h"
#include "tests/ntk_checks.h"
#include "tests/program_checks.h"

namespace kernelmeta {
namespace {

struct HeadCase {
  Sizes s;  // T, S, Q, N, D, K
  Oracle oracle;
  bool first_order, heads, need_support, need_query, bank;
  int64_t offset = 0;  // elements before the first feature
};

struct HeadEpisode {
  HeadCase c;
  Vec support, query, weight, bias, rates, grad_logits, grad_heads;
  std::vector<int64_t> labels, support_index, query_index;

  explicit HeadEpisode(const HeadCase& of)
      : c(of),
        support(draw_floats(c.s.T * c.s.S * c.s.D)),
        query(draw_floats(c.s.T * c.s.Q * c.s.D)),
        weight(draw_floats(c.s.N * c.s.D)),
        bias(draw_floats(c.s.N)),
        rates(draw_floats(c.s.K, 0.05, 0.2)),
        grad_logits(draw_floats(c.s.T * c.s.Q * c.s.N)),
        grad_heads(draw_floats(c.s.T * c.s.N * (c.s.D + 1))),
        labels(draw_numbers(c.s.T * c.s.S, c.s.N)),
        support_index(draw_numbers(c.s.T * c.s.S, c.s.T * c.s.S)),
        query_index(draw_numbers(c.s.T * c.s.Q, c.s.T * c.s.Q)) {}

  // Features that F stores as they are.
  template <class F>
  void round_features() {
    for (Vec* v : {&support, &query}) *v = rounded<F>(*v);
  }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const Sizes& s = c.s;
    const auto moved = [&](const Vec& v) {
      Vec all(size_t(c.offset), NAN);
      all.insert(all.end(), v.begin(), v.end());
      return exactly<F>(all);
    };
    const auto x = moved(support), q = moved(query);
    const auto w = exactly<C>(weight), b = exactly<C>(bias), r = exactly<C>(rates),
               gz = exactly<C>(grad_logits), gh = exactly<C>(grad_heads);
    const auto features = [&](const std::vector<F>& of, int64_t rows, const std::vector<int64_t>& index) {
      const F* first = of.data() + c.offset;
      if (c.bank) return Features{first, kStorage<F>, rows, 0, s.D, index.data(), s.T * rows};
      return Features{first, kStorage<F>, rows, rows * s.D, s.D, nullptr, 0};
    };
    const HeadProblem<C> problem{s,
                                 features(x, s.S, support_index),
                                 features(q, s.Q, query_index),
                                 labels.data(),
                                 w.data(),
                                 b.data(),
                                 r.data(),
                                 c.oracle,
                                 c.first_order};
    Output<C> logits(s.T * s.Q * s.N), again(s.T * s.Q * s.N), heads(s.T * s.N * (s.D + 1)),
        trace(s.T * head_trace_size<C>(s)), gsupport(s.T * s.S * s.D), gquery(s.T * s.Q * s.D);
    C* wanted_heads = c.heads ? heads.get() : nullptr;
    kernels.linear_head_forward({problem, again.get(), wanted_heads, nullptr}, 0, s.T);
    kernels.linear_head_forward({problem, logits.get(), wanted_heads, trace.get()}, 0, s.T);
    std::vector<C> sums(size_t(size_of<HeadParameterGrad<C>, C>(s)));
    Arena<C> arena(sums.data());
    const HeadParameterGrad<C> grad(arena, s);
    kernels.linear_head_backward(
        {problem, trace.get(), gz.data(), c.heads ? gh.data() : nullptr,
         c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr},
        grad, 0, s.T);
    Named all;
    logits.keep(all, "logits");
    again.keep(all, "logits without a trace");
    if (c.heads) heads.keep(all, "heads");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    all.emplace_back("weight", Vec(grad.weight, grad.weight + s.N * s.D));
    all.emplace_back("bias", Vec(grad.bias, grad.bias + s.N));
    all.emplace_back("rates", Vec(grad.rates, grad.rates + s.K));
    trace.keep(all, "trace");  // handed out: its padding too must be the same every time
    return all;
  }

  std::string text() const {
    return "linear head, oracle " + std::to_string(int64_t(c.oracle)) + ", T=" + std::to_string(c.s.T) +
           " S=" + std::to_string(c.s.S) + " Q=" + std::to_string(c.s.Q) + " N=" + std::to_string(c.s.N) +
           " D=" + std::to_string(c.s.D) + " K=" + std::to_string(c.s.K);
  }
};

std::vector<HeadCase> head_cases() {
  //        T  S  Q   N  D  H  K
  return {{{2, 7, 11, 3, 13, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{1, 1, 1, 1, 1, 0, 1}, Oracle::kSquaredError, false, true, true, true, false},
          {{3, 20, 17, 5, 37, 0, 3}, Oracle::kHinge, false, false, true, true, true},
          {{2, 18, 5, 4, 40, 0, 2}, Oracle::kSquaredError, true, true, true, false, false},
          {{2, 5, 9, 3, 16, 0, 0}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{2, 6, 9, 3, 16, 0, 0}, Oracle::kCrossEntropy, false, true, false, false, false},
          {{1, 100, 9, 2, 21, 0, 2}, Oracle::kCrossEntropy, false, false, false, false, false}};
}

struct RidgeCase {
  int64_t D, N;
  std::vector<int64_t> S, Q, ways;
  bool coefficients, bank, need_support, need_query;
};

struct RidgeEpisode {
  RidgeCase c;
  Tasks tasks;
  Vec lambda{0.75}, scale{2.5}, bias{0.25}, grad_logits, grad_coefficients;

  explicit RidgeEpisode(const RidgeCase& of)
      : c(of),
        tasks(c.D, c.N, c.S, c.Q, c.ways, c.bank),
        grad_logits(draw_floats(tasks.rows(true) * c.N)),
        grad_coefficients(draw_floats(tasks.rows(false) * c.N)) {}

  template <class F>
  void round_features() {
    tasks.round_features<F>();
  }

  // F: how the features are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const auto x = exactly<F>(tasks.support), q = exactly<F>(tasks.query);
    const auto la = exactly<C>(lambda), sc = exactly<C>(scale), b = exactly<C>(bias),
               gz = exactly<C>(grad_logits), ga = exactly<C>(grad_coefficients);
    const int64_t T = tasks.T();
    RidgeProblem<C> p{T,         c.N,       c.D,     tasks.of(false, x), tasks.of(true, q), tasks.classes(),
                      la.data(), sc.data(), b.data()};
    int64_t stride = 0;
    for (int64_t t = 0; t < T; ++t) stride = std::max(stride, ridge_trace_size<C>(p.sizes(t)));
    std::vector<int64_t> trace_offsets;
    for (int64_t t = 0; t <= T; ++t) trace_offsets.push_back(t * stride);
    tasks.mislead(p.support);
    const int64_t all_s = tasks.rows(false), all_q = tasks.rows(true);
    Output<C> logits(all_q * c.N), again(all_q * c.N), alpha(all_s * c.N), trace(T * stride),
        gsupport(all_s * c.D), gquery(all_q * c.D);
    const std::unique_ptr<bool[]> singular(new bool[size_t(T)]());
    kernels.ridge_forward({p, again.get(), alpha.get(), nullptr}, trace_offsets.data(), singular.get(), 0, T);
    kernels.ridge_forward({p, logits.get(), alpha.get(), trace.get()}, trace_offsets.data(), singular.get(),
                          0, T);
    std::vector<C> sums(size_t(size_of<RidgeGrad<C>, C>()));
    Arena<C> arena(sums.data());
    const RidgeGrad<C> grad(arena);
    kernels.ridge_backward({p, trace.get(), gz.data(), c.coefficients ? ga.data() : nullptr,
                            c.need_support ? gsupport.get() : nullptr, c.need_query ? gquery.get() : nullptr},
                           trace_offsets.data(), grad, 0, T);
    Named all;
    logits.keep(all, "logits");
    again.keep(all, "logits without a trace");
    alpha.keep(all, "coefficients");
    if (c.need_support) gsupport.keep(all, "support");
    if (c.need_query) gquery.keep(all, "query");
    all.emplace_back("regularization, scale, bias", Vec{*grad.lambda, *grad.scale, *grad.bias});
    return all;
  }

  std::string text() const { return "ridge, " + tasks.text(); }
};

std::vector<RidgeCase> ridge_cases() {
  return {{13, 3, {7, 7}, {11, 11}, {3, 3}, true, false, true, true},
          {9, 1, {1}, {1}, {1}, false, false, true, true},
          {40, 4, {4, 19, 33}, {3, 20, 1}, {4, 2, 3}, true, true, true, true},
          {21, 2, {18}, {5}, {2}, false, false, false, false},
          {16, 2, {6}, {5}, {2}, true, false, false, true}};
}

// Zero where both are minus infinity: logits of ways that a task does not have.
Vec finite(const Vec& values, const Vec& want) {
  Vec some = values;
  for (size_t i = 0; i < some.size(); ++i) {
    if (want[i] == -INFINITY && values[i] == want[i]) some[i] = 0;
  }
  return some;
}

void compare_named(const std::string& name, const Named& got, const Named& want, double tolerance) {
  for (size_t i = 0; i < want.size(); ++i) {
    const std::string what = name + ": " + want[i].first;
    if (got[i].second.size() == want[i].second.size()) {
      expect_near(what, finite(got[i].second, want[i].second), finite(want[i].second, want[i].second),
                  tolerance);
    } else {
      std::printf("FAILED %s: %zu elements for %zu\n", what.c_str(), got[i].second.size(),
                  want[i].second.size());
      ++failures;
    }
  }
}

// `got` in double and in float against `right` in double.
template <class E>
void compare_episode(const std::string& name, const E& episode, const KernelTable& right,
                     const KernelTable& got) {
  const Named want = episode.template run<double>(right);
  compare_named(name + " " + episode.text(), episode.template run<double>(got), want, 1e-10);
  compare_named(name + " " + episode.text(), episode.template run<float>(got), want, 2e-4);
}

// `got` in float, which reads features stored as F, against `right` in double.
template <class F, class E>
void compare_narrow(const std::string& name, E episode, const KernelTable& right, const KernelTable& got) {
  episode.template round_features<F>();
  compare_named(name + " " + episode.text(), episode.template run<float, F>(got),
                episode.template run<double>(right), 2e-4);
}

// So many rows that they do not all meet at once.
HeadCase many_head_rows() {
  return {{1, 130, 9, 2, 71, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, true};
}
// An even number of features, which two of the words on rows share out among threads in two ways: in more
// rows than five, or where two features cannot be read at once.
std::vector<HeadCase> even_head_rows() {
  return {{{1, 9, 7, 3, 80, 0, 2}, Oracle::kCrossEntropy, false, true, true, true, false},
          {{1, 4, 7, 3, 80, 0, 2}, Oracle::kSquaredError, false, true, true, true, false, 1}};
}
RidgeCase many_ridge_rows() { return {70, 2, {40}, {101}, {2}, true, false, true, true}; }

template <class F>
int check_narrow_learners(const std::string& name, const KernelTable& right, const KernelTable& got) {
  const auto of_others = generator;
  generator.seed(2);
  for (const HeadCase& c : head_cases()) compare_narrow<F>(name, HeadEpisode(c), right, got);
  for (const ProgramCase& c : program_cases()) compare_narrow<F>(name, ProgramEpisode(c), right, got);
  for (const RidgeCase& c : ridge_cases()) compare_narrow<F>(name, RidgeEpisode(c), right, got);
  for (const DistillationCase& c : distillation_cases())
    compare_narrow<F>(name, DistillationEpisode(c), right, got);
  for_each_network([&](const auto& episode) { compare_narrow<F>(name, episode, right, got); });
  compare_narrow<F>(name, HeadEpisode(many_head_rows()), right, got);
  compare_narrow<F>(name, RidgeEpisode(many_ridge_rows()), right, got);
  for (const HeadCase& c : even_head_rows()) compare_narrow<F>(name, HeadEpisode(c), right, got);
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "narrow learners: all passed\n", failures);
  return failures != 0;
}

[[maybe_unused]] int check_learners(const std::string& name, const KernelTable& right, const KernelTable& got,
                                    bool joint = false) {
  const auto of_others = generator;
  generator.seed(1);
  for (const HeadCase& c : head_cases()) compare_episode(name, HeadEpisode(c), right, got);
  for (const ProgramCase& c : program_cases(joint)) compare_episode(name, ProgramEpisode(c), right, got);
  for (const RidgeCase& c : ridge_cases()) compare_episode(name, RidgeEpisode(c), right, got);
  for (const DistillationCase& c : distillation_cases())
    compare_episode(name, DistillationEpisode(c), right, got);
  for_each_network([&](const auto& episode) { compare_episode(name, episode, right, got); });
  for (const HeadCase& c : even_head_rows()) compare_episode(name, HeadEpisode(c), right, got);
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "learners: all passed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace kernelmeta
