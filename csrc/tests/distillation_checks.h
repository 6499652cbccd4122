// Kernels of `focal_distillation`, for learner_checks.h.
#pragma once

#include "tests/named_results.h"

namespace kernelmeta {
namespace {

struct DistillationCase {
  int64_t R, N;
  LogitDistance distance;
  double tau, power, smoothing, spread;  // spread: of the logits
  bool weighted, labelled, ruled_out;
};

struct DistillationEpisode {
  DistillationCase c;
  Vec now, old, class_weight, grad_distances, grad_label_losses;
  std::vector<int64_t> labels;

  explicit DistillationEpisode(const DistillationCase& of)
      : c(of),
        now(draw_floats(c.R * c.N, -c.spread, c.spread)),
        old(draw_floats(c.R * c.N, -c.spread, c.spread)),
        class_weight(draw_floats(c.N, 0.5, 2)),
        grad_distances(draw_floats(c.R)),
        grad_label_losses(draw_floats(c.R)),
        labels(draw_numbers(c.R, c.N)) {
    if (c.R > 2) labels[1] = -100;
    for (int64_t r = 0; r < c.R && c.ruled_out; ++r) {
      const auto n = size_t(r * c.N + (std::max<int64_t>(labels[size_t(r)], 0) + 1) % c.N);
      old[n] = -INFINITY;
      if (r % 2) now[n] = -INFINITY;
    }
  }

  template <class F>
  void round_features() {
    for (Vec* v : {&now, &old}) *v = rounded<F>(*v);
  }

  // F: how the logits are stored.
  template <class C, class F = C>
  Named run(const KernelTable& table) const {
    const Kernels<C>& kernels = table.of<C>();
    const auto z = exactly<F>(now), z_old = exactly<F>(old);
    const auto w = exactly<C>(class_weight), gd = exactly<C>(grad_distances),
               gl = exactly<C>(grad_label_losses);
    const auto rows = [&](const std::vector<F>& of) {
      return Features{of.data(), kStorage<F>, 1, c.N, 0, nullptr, 0};
    };
    const DistillationProblem<C> problem{c.R,
                                         c.N,
                                         rows(z),
                                         rows(z_old),
                                         labels.data(),
                                         c.weighted ? w.data() : nullptr,
                                         c.distance,
                                         C(1),
                                         C(5),
                                         C(c.tau),
                                         C(0.25),
                                         C(c.power),
                                         C(c.smoothing),
                                         c.labelled,
                                         -100};
    Output<C> distances(c.R), again(c.R), label_losses(c.R), trace(c.R * DistillationRow::kSize),
        grad(c.R * c.N);
    std::vector<uint8_t> codes(size_t(c.R), 255);
    C* losses = c.labelled ? label_losses.get() : nullptr;
    kernels.focal_distillation_forward({problem, again.get(), losses, codes.data(), nullptr}, 0, c.R);
    kernels.focal_distillation_forward({problem, distances.get(), losses, codes.data(), trace.get()}, 0, c.R);
    kernels.focal_distillation_backward(
        {problem, trace.get(), gd.data(), c.labelled ? gl.data() : nullptr, grad.get()}, 0, c.R);
    Named all;
    distances.keep(all, "distances");
    again.keep(all, "distances without a trace");
    if (c.labelled) label_losses.keep(all, "label losses");
    all.emplace_back("codes", Vec(codes.begin(), codes.end()));
    grad.keep(all, "new logits");
    return all;
  }

  std::string text() const {
    return "focal distillation, distance " + std::to_string(int64_t(c.distance)) +
           ", R=" + std::to_string(c.R) + " N=" + std::to_string(c.N) + " tau=" + std::to_string(c.tau);
  }
};

std::vector<DistillationCase> distillation_cases() {
  using D = LogitDistance;
  return {{7, 33, D::kKl, 100, 2, 0, 3, false, true, false},
          {13, 5, D::kKl, 1, 2, 0.1, 3, true, true, true},
          {2, 40, D::kKl, 1, 2, 0, 60, false, false, true},
          {3, 1, D::kKl, 2, 2, 0.1, 3, false, true, false},
          {9, 17, D::kSquared, 1, 2, 0, 3, true, true, false},
          {1, 64, D::kSquaredMean, 1, 2, 0.2, 3, false, true, true},
          {14, 20, D::kLdi, 1, 2, 0, 3, false, true, true},
          {5, 7, D::kLdiMean, 1, 1, 0, 3, false, false, false},
          {4, 50, D::kLdi, 1, 3.5, 0, 3, false, true, false}};
}

}  // namespace
}  // namespace kernelmeta
