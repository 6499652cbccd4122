// Kernels of the other learners (csrc/cpu/kernel_table.h), double and float, against those of a table that is
// taken for right: it is compared with PyTorch by tests/ops.
#pragma once

#include "tests/engine_checks.h"

namespace {

// Everything that a call gave, by name.
using Named = std::vector<std::pair<std::string, Vec>>;

// An array of exactly this size, in the precision of the kernels; what is written into it is kept as doubles.
template <class C>
struct Output {
  std::vector<C> values;

  explicit Output(int64_t n) : values(size_t(n), C(NAN)) {}
  C* get() { return values.data(); }
  void keep(Named& all, const char* name) const { all.emplace_back(name, Vec(values.begin(), values.end())); }
};

template <class C>
constexpr Storage kStorage = sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64;

// [count] of 0..n-1
std::vector<int64_t> draw_numbers(int64_t count, int64_t n) {
  std::uniform_int_distribution<int64_t> uniform(0, n - 1);
  std::vector<int64_t> v(static_cast<size_t>(count));
  for (int64_t& x : v) x = uniform(generator);
  return v;
}

// Rounded to float: both precisions are given the same numbers.
Vec draw_floats(int64_t n, double low = -1, double high = 1) {
  Vec v = draw(n, low, high);
  for (double& x : v) x = double(float(x));
  return v;
}

struct HeadCase {
  Sizes s;  // T, S, Q, N, D, K
  Oracle oracle;
  bool first_order, heads, need_support, need_query, bank;
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

  template <class C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = kernels_of<C>(table);
    const Sizes& s = c.s;
    const auto x = exactly<C>(support), q = exactly<C>(query), w = exactly<C>(weight), b = exactly<C>(bias),
               r = exactly<C>(rates), gz = exactly<C>(grad_logits), gh = exactly<C>(grad_heads);
    const auto features = [&](const std::vector<C>& of, int64_t rows, const std::vector<int64_t>& index) {
      if (c.bank) return Features{of.data(), kStorage<C>, rows, 0, s.D, index.data(), s.T * rows};
      return Features{of.data(), kStorage<C>, rows, rows * s.D, s.D, nullptr, 0};
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

  template <class C>
  static const Kernels<C>& kernels_of(const KernelTable& table) {
    if constexpr (sizeof(C) == 4)
      return table.f32;
    else
      return table.f64;
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

// `got` in double and in float against `right` in double.
template <class E>
void compare_episode(const std::string& name, const E& episode, const KernelTable& right,
                     const KernelTable& got) {
  const Named want = episode.template run<double>(right);
  const auto compare = [&](const Named& results, double tolerance) {
    for (size_t i = 0; i < want.size(); ++i) {
      const std::string what = name + " " + episode.text() + ": " + want[i].first;
      if (results[i].second.size() == want[i].second.size()) {
        expect_near(what, results[i].second, want[i].second, tolerance);
      } else {
        std::printf("FAILED %s: %zu elements for %zu\n", what.c_str(), results[i].second.size(),
                    want[i].second.size());
        ++failures;
      }
    }
  };
  compare(episode.template run<double>(got), 1e-10);
  compare(episode.template run<float>(got), 2e-4);
}

[[maybe_unused]] int check_learners(const std::string& name, const KernelTable& right,
                                    const KernelTable& got) {
  const auto of_others = generator;
  generator.seed(1);
  for (const HeadCase& c : head_cases()) compare_episode(name, HeadEpisode(c), right, got);
  generator = of_others;
  std::printf(failures ? "%d failed\n" : "learners: all passed\n", failures);
  return failures != 0;
}

}  // namespace
