// Kernels of parts of `sib` that are ops of their own: the synthetic gradient's MLP and class means, for
// learner_checks.h.
#pragma once

#include <cstring>

#include "tests/named_results.h"

namespace kernelmeta {
namespace {

struct MlpEpisode {
  Sizes s;  // T, Q, N, H
  bool fixed;
  Vec logits, grad_out, statistics;
  std::vector<Vec> tensors;  // in the order of MlpArrays

  MlpEpisode(const Sizes& sizes, bool fixed)
      : s(sizes),
        fixed(fixed),
        logits(draw_floats(s.T * s.Q * s.N)),
        grad_out(draw_floats(s.T * s.Q * s.N)),
        statistics(draw_floats(4 * s.H, 0.5, 1.5)) {
    for (const int64_t n : {s.H * s.N, s.H, s.H, s.H, s.H * s.H, s.H, s.H, s.H, s.N * s.H, s.N}) {
      tensors.push_back(draw_floats(n));
    }
  }

  template <class C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    std::vector<std::vector<C>> p;
    for (const Vec& v : tensors) p.push_back(exactly<C>(v));
    const MlpArrays<const C> arrays{p[0].data(), p[1].data(), p[2].data(), p[3].data(), p[4].data(),
                                    p[5].data(), p[6].data(), p[7].data(), p[8].data(), p[9].data()};
    const auto z = exactly<C>(logits), g = exactly<C>(grad_out), stats = exactly<C>(statistics);
    const MlpProblem<C> problem{s, arrays, fixed ? stats.data() : nullptr, z.data()};
    std::vector<C> memory(size_t(size_of<FoldedMlp<C>, C>(s, fixed)));
    Arena<C> folded(memory.data());
    const FoldedMlp<C> mlp(folded, s, fixed);
    SerialBlock<C> serial;
    fold(serial, arrays, problem.running, s, mlp);
    Output<C> out(s.T * s.Q * s.N), gz(s.T * s.Q * s.N);
    kernels.mlp_forward(problem, mlp, out.get(), 0, s.T);
    std::vector<C> sums(size_t(size_of<FoldedMlpGrad<C>, C>(s)));
    Arena<C> arena(sums.data());
    const FoldedMlpGrad<C> grad(arena, s);
    kernels.mlp_backward(problem, mlp, g.data(), gz.get(), grad, 0, s.T);
    Named all;
    out.keep(all, "gradients");
    gz.keep(all, "logits");
    const auto keep = [&](const char* name, const C* from, int64_t rows, int64_t n, int64_t ld) {
      Vec values;
      for (int64_t i = 0; i < rows; ++i) values.insert(values.end(), from + i * ld, from + i * ld + n);
      all.emplace_back(name, values);
    };
    keep("weight1", grad.w1t, s.N, s.H, padded(s.H));
    keep("bias1", grad.b1, 1, s.H, 0);
    keep("weight2", grad.w2, s.H, s.H, padded(s.H));
    keep("bias2", grad.b2, 1, s.H, 0);
    keep("weight3", grad.w3, s.N, s.H, padded(s.H));
    keep("bias3", grad.b3, 1, s.N, 0);
    return all;
  }

  std::string text() const {
    return "mlp, T=" + std::to_string(s.T) + " Q=" + std::to_string(s.Q) + " N=" + std::to_string(s.N) +
           " H=" + std::to_string(s.H);
  }
};

struct ClassMeansEpisode {
  Sizes s;  // T, S, N, D
  bool weighted, need_support;
  Vec support, weight, grad_theta0;
  std::vector<int64_t> labels;  // row i belongs to class i % N
  std::vector<int32_t> members, offsets;

  ClassMeansEpisode(const Sizes& sizes, bool weighted, bool need_support)
      : s(sizes),
        weighted(weighted),
        need_support(need_support),
        support(draw_floats(s.T * s.S * s.D)),
        weight(draw_floats(s.D, 0.5, 1.5)),
        grad_theta0(draw_floats(s.T * s.N * s.D)) {
    for (int64_t t = 0; t < s.T; ++t) {
      const size_t first = members.size();
      for (int64_t n = 0; n < s.N; ++n) {
        offsets.push_back(int32_t(members.size() - first));
        for (int64_t i = n; i < s.S; i += s.N) members.push_back(int32_t(i));
      }
      offsets.push_back(int32_t(s.S));
      for (int64_t i = 0; i < s.S; ++i) labels.push_back(i % s.N);
    }
  }

  template <class F>
  void round_features() {
    support = rounded<F>(support);
  }

  // F: how the features are stored. Kernels on a CPU are given classes that are sorted already.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const auto x = exactly<F>(support);
    const auto w = exactly<C>(weight), g = exactly<C>(grad_theta0);
    const bool sorts = std::strcmp(table.isa, "lanes") == 0;
    const ClassTable classes = sorts ? ClassTable{labels.data(), nullptr, nullptr}
                                     : ClassTable{nullptr, members.data(), offsets.data()};
    const ClassMeansProblem<C> problem{
        s, {x.data(), kStorage<F>, s.S, s.S * s.D, s.D, nullptr, 0}, classes, weighted ? w.data() : nullptr};
    Output<C> theta0(s.T * s.N * s.D), gsupport(s.T * s.S * s.D);
    kernels.class_means_forward(problem, theta0.get(), 0, s.T);
    std::vector<C> gweight(size_t(padded(s.D)));
    kernels.class_means_backward(problem, g.data(), need_support ? gsupport.get() : nullptr,
                                 weighted ? gweight.data() : nullptr, 0, s.T);
    Named all;
    theta0.keep(all, "theta0");
    if (need_support) gsupport.keep(all, "support");
    if (weighted) all.emplace_back("weight", Vec(gweight.begin(), gweight.begin() + s.D));
    return all;
  }

  std::string text() const {
    return "class means, T=" + std::to_string(s.T) + " S=" + std::to_string(s.S) +
           " N=" + std::to_string(s.N) + " D=" + std::to_string(s.D);
  }
};

// check(episode, whether its features may be stored in 16 bits)
template <class Check>
void for_each_part(Check check) {
  //                       T  S  Q   N  D  H
  check(MlpEpisode(Sizes{3, 0, 11, 3, 0, 5, 0}, false), std::false_type{});
  check(MlpEpisode(Sizes{2, 0, 75, 5, 0, 40, 0}, true), std::false_type{});
  check(MlpEpisode(Sizes{1, 0, 101, 2, 0, 17, 0}, false), std::false_type{});
  check(ClassMeansEpisode(Sizes{3, 7, 0, 3, 37, 0, 0}, true, true), std::true_type{});
  check(ClassMeansEpisode(Sizes{2, 25, 0, 5, 640, 0, 0}, true, true), std::true_type{});
  check(ClassMeansEpisode(Sizes{2, 4, 0, 4, 13, 0, 0}, false, true), std::true_type{});
  check(ClassMeansEpisode(Sizes{1, 6, 0, 2, 21, 0, 0}, true, false), std::true_type{});
}

}  // namespace
}  // namespace kernelmeta
