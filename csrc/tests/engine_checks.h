// Kernels (csrc/cpu/kernel_table.h) against the paper's form in D dimensions and central differences.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernel_table.h"
#include "engine/serial_block.h"
#include "tests/narrow_float.h"

namespace kernelmeta {
namespace {

using Vec = std::vector<double>;

std::mt19937_64 generator(0);

Vec draw(int64_t n, double low = -1, double high = 1) {
  std::uniform_real_distribution<double> uniform(low, high);
  Vec v(static_cast<size_t>(n));
  for (double& x : v) x = uniform(generator);
  return v;
}

// Everything a task depends on, in double, one task after the other.
struct Episode {
  Sizes s;
  bool from_support, running;
  double lr;
  Vec query, start, weight, scale, bias, weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2,
      weight3, bias3, statistics;
  std::vector<int32_t> members, offsets;
  std::vector<int64_t> labels;

  // along: what all features are moved by. With much of it all rows are nearly parallel, and so are the pulls
  // and the classifiers: at large rates the steps cancel (engine/cosine_step.h).
  Episode(const Sizes& sizes, bool from_support, bool running, double lr, double along = 0)
      : s(sizes),
        from_support(from_support),
        running(running),
        lr(lr),
        query(draw(s.T * s.Q * s.D, along - 1, along + 1)),
        start(draw(s.T * s.S * s.D, along - 1, along + 1)),
        weight(draw(s.D, 0.5, 1.5)),
        scale{7.3},
        bias{0.11},
        weight1(draw(s.H * s.N)),
        bias1(draw(s.H)),
        gain1(draw(s.H, 0.5, 1.5)),
        shift1(draw(s.H)),
        weight2(draw(s.H * s.H)),
        bias2(draw(s.H)),
        gain2(draw(s.H, 0.5, 1.5)),
        shift2(draw(s.H)),
        weight3(draw(s.N * s.H)),
        bias3(draw(s.N)),
        statistics(draw(4 * s.H, 0.5, 1.5)) {
    for (int64_t t = 0; t < s.T; ++t) {  // row i belongs to class i % N
      int32_t offset = 0;
      for (int64_t n = 0; n < s.N; ++n) {
        offsets.push_back(offset);
        for (int64_t i = n; i < s.S; i += s.N) members.push_back(static_cast<int32_t>(i)), ++offset;
      }
      offsets.push_back(offset);
      for (int64_t i = 0; i < s.S; ++i) labels.push_back(i % s.N);
    }
  }

  ClassTable classes(bool as_labels) const {
    if (!from_support) return {nullptr, nullptr, nullptr};
    if (as_labels) return {labels.data(), nullptr, nullptr};
    return {nullptr, members.data(), offsets.data()};
  }

  std::vector<std::pair<const char*, Vec*>> parameters() {
    return {{"weight", &weight}, {"scale", &scale}, {"bias", &bias},     {"weight1", &weight1},
            {"bias1", &bias1},   {"gain1", &gain1}, {"shift1", &shift1}, {"weight2", &weight2},
            {"bias2", &bias2},   {"gain2", &gain2}, {"shift2", &shift2}, {"weight3", &weight3},
            {"bias3", &bias3}};
  }
};

// ---- the paper's form, one task, written with no thought of speed

double norm(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return std::max(std::sqrt(sum), kNormFloor);
}

Vec classify(const Episode& e, const Vec& theta, const double* query) {
  const auto& [T, S, Q, N, D, H, K, pairs] = e.s;
  Vec z(static_cast<size_t>(Q * N));
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t n = 0; n < N; ++n) {
      double dot = 0;
      for (int64_t d = 0; d < D; ++d) dot += query[q * D + d] * theta[size_t(n * D + d)];
      z[size_t(q * N + n)] =
          e.scale[0] * (e.bias[0] + dot / norm(query + q * D, D) / norm(&theta[size_t(n * D)], D));
    }
  }
  return z;
}

Vec layer(const Vec& x, int64_t Q, int64_t in, int64_t out, const Vec& w, const Vec& b) {
  Vec y(static_cast<size_t>(Q * out));
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t i = 0; i < out; ++i) {
      double sum = b[size_t(i)];
      for (int64_t j = 0; j < in; ++j) sum += w[size_t(i * in + j)] * x[size_t(q * in + j)];
      y[size_t(q * out + i)] = sum;
    }
  }
  return y;
}

void relu_norm(Vec& y, int64_t Q, int64_t H, const Vec& gain, const Vec& shift, const double* fixed) {
  for (int64_t h = 0; h < H; ++h) {
    double mean = 0, variance = 0;
    for (int64_t q = 0; q < Q; ++q)
      mean += (y[size_t(q * H + h)] = std::max(y[size_t(q * H + h)], 0.0)) / double(Q);
    for (int64_t q = 0; q < Q; ++q) variance += std::pow(y[size_t(q * H + h)] - mean, 2) / double(Q);
    if (fixed) mean = fixed[h], variance = fixed[H + h];
    for (int64_t q = 0; q < Q; ++q) {
      double& v = y[size_t(q * H + h)];
      v = (v - mean) / std::sqrt(variance + kNormEps) * gain[size_t(h)] + shift[size_t(h)];
    }
  }
}

// Sum of weights_z * logits and weights_theta * theta_K over all tasks.
double objective(const Episode& e, const Vec& weights_z, const Vec& weights_theta, Vec* logits) {
  const auto& [T, S, Q, N, D, H, K, pairs] = e.s;
  double total = 0;
  for (int64_t t = 0; t < T; ++t) {
    const double* query = &e.query[size_t(t * Q * D)];
    Vec theta(static_cast<size_t>(N * D));
    for (int64_t i = 0; i < S; ++i) {
      const double* x = &e.start[size_t((t * S + i) * D)];
      for (int64_t d = 0; d < D; ++d) {
        if (e.from_support) {
          const int64_t n = i % N, count = (S - n + N - 1) / N;
          theta[size_t(n * D + d)] += e.weight[size_t(d)] * x[d] / norm(x, D) / double(count);
        } else {
          theta[size_t(i * D + d)] = x[d];
        }
      }
    }
    for (int64_t k = 0; k < K; ++k) {
      Vec h = layer(classify(e, theta, query), Q, N, H, e.weight1, e.bias1);
      relu_norm(h, Q, H, e.gain1, e.shift1, e.running ? &e.statistics[0] : nullptr);
      h = layer(h, Q, H, H, e.weight2, e.bias2);
      relu_norm(h, Q, H, e.gain2, e.shift2, e.running ? &e.statistics[size_t(2 * H)] : nullptr);
      const Vec g = layer(h, Q, H, N, e.weight3, e.bias3);
      for (int64_t n = 0; n < N; ++n) {
        double* th = &theta[size_t(n * D)];
        const double r = norm(th, D);
        Vec step(static_cast<size_t>(D));
        double along = 0;
        for (int64_t q = 0; q < Q; ++q) {
          const double share = e.scale[0] * g[size_t(q * N + n)] / norm(query + q * D, D) / r;
          for (int64_t d = 0; d < D; ++d) step[size_t(d)] += share * query[q * D + d];
        }
        for (int64_t d = 0; d < D; ++d) along += step[size_t(d)] * th[d] / r / r;
        for (int64_t d = 0; d < D; ++d) step[size_t(d)] -= along * th[d];
        for (int64_t d = 0; d < D; ++d) th[d] -= e.lr * step[size_t(d)];
      }
    }
    const Vec z = classify(e, theta, query);
    for (int64_t i = 0; i < Q * N; ++i) total += weights_z[size_t(t * Q * N + i)] * z[size_t(i)];
    for (int64_t i = 0; i < N * D; ++i) total += weights_theta[size_t(t * N * D + i)] * theta[size_t(i)];
    if (logits) logits->insert(logits->end(), z.begin(), z.end());
  }
  return total;
}

// ---- the engine

// The same numbers as F stores them.
template <class F>
Vec rounded(const Vec& v) {
  Vec to;
  for (const double x : v) to.push_back(double(float(F(float(x)))));
  return to;
}

// A heap block of exactly this size, so that AddressSanitizer sees one element too many.
template <class C>
std::vector<C> exactly(const Vec& v) {
  return std::vector<C>(v.begin(), v.end());
}

template <class F>
constexpr Storage kStorage = sizeof(F) == 8                  ? Storage::kFloat64
                             : sizeof(F) == 4                ? Storage::kFloat32
                             : std::is_same_v<F, BrainFloat> ? Storage::kBFloat16
                                                             : Storage::kFloat16;

template <class C>
struct Results {
  std::vector<C> logits, theta, grad_query, grad_start, weight, scale, bias;
  std::vector<std::vector<C>> mlp;  // in the order of MlpArrays
};

// What is asked for beside logits and the gradients of the parameters.
struct Wanted {
  bool theta = true, grad_query = true, grad_start = true;
};

// F: how the features are stored.
template <class C, class F = C>
Results<C> run(const Kernels<C>& kernels, const Episode& e, bool as_labels, const Vec& weights_z,
               const Vec& weights_theta, const Wanted& wanted = {}) {
  const auto& [T, S, Q, N, D, H, K, pairs] = e.s;
  const Storage of_start = e.from_support ? kStorage<F> : kStorage<C>;
  const auto query = exactly<F>(e.query), support = exactly<F>(e.start);
  const auto theta0 = exactly<C>(e.start), weight = exactly<C>(e.weight);
  const void* start = e.from_support ? static_cast<const void*>(support.data()) : theta0.data();
  const auto statistics = exactly<C>(e.statistics);
  const Vec* tensors[] = {&e.weight1, &e.bias1, &e.gain1,  &e.shift1,  &e.weight2,
                          &e.bias2,   &e.gain2, &e.shift2, &e.weight3, &e.bias3};
  std::vector<std::vector<C>> p;
  for (const Vec* v : tensors) p.push_back(exactly<C>(*v));
  const MlpArrays<const C> arrays{p[0].data(), p[1].data(), p[2].data(), p[3].data(), p[4].data(),
                                  p[5].data(), p[6].data(), p[7].data(), p[8].data(), p[9].data()};
  const C* running = e.running ? statistics.data() : nullptr;
  std::vector<C> folded_memory(size_t(size_of<FoldedMlp<C>, C>(e.s, e.running)));
  Arena<C> folded_arena(folded_memory.data());
  const FoldedMlp<C> mlp(folded_arena, e.s, e.running);
  SerialBlock<C> serial;
  fold(serial, arrays, running, e.s, mlp);
  const C scale = C(e.scale[0]), bias = C(e.bias[0]);
  const SibProblem<C> problem{e.s,
                              {query.data(), kStorage<F>, Q, Q * D, D, nullptr, 0},
                              {start, of_start, S, S * D, D, nullptr, 0},
                              e.classes(as_labels),
                              e.from_support ? weight.data() : nullptr,
                              &scale,
                              &bias,
                              C(e.lr),
                              arrays,
                              running,
                              wanted.theta};

  Results<C> r;
  r.logits.resize(size_t(T * Q * N));
  r.theta.resize(size_t(T * N * D));
  std::vector<C> stats(static_cast<size_t>(T * K * 4 * H));
  std::vector<C> trace(size_t(T * trace_size<C>(e.s, wanted.theta)), C(NAN));
  kernels.sib_forward(
      {problem, r.logits.data(), wanted.theta ? r.theta.data() : nullptr, stats.data(), trace.data()}, mlp, 0,
      T);

  const auto gz = exactly<C>(weights_z), gt = exactly<C>(weights_theta);
  r.grad_query.resize(query.size());
  r.grad_start.resize(theta0.size());
  std::vector<C> sums(size_t(size_of<SibParameterGrad<C>, C>(e.s)));
  Arena<C> arena(sums.data());
  const SibParameterGrad<C> grad(arena, e.s);
  kernels.sib_backward(
      {problem, trace.data(), gz.data(), wanted.theta ? gt.data() : nullptr,
       wanted.grad_query ? r.grad_query.data() : nullptr, wanted.grad_start ? r.grad_start.data() : nullptr},
      mlp, grad, 0, T);
  for (const auto& v : p) r.mlp.emplace_back(v.size());
  auto& m = r.mlp;
  unfold(serial, arrays, grad.mlp, e.s,
         {m[0].data(), m[1].data(), m[2].data(), m[3].data(), m[4].data(), m[5].data(), m[6].data(),
          m[7].data(), m[8].data(), m[9].data()});
  r.weight.assign(grad.weight, grad.weight + D);
  r.scale = {*grad.scale};
  r.bias = {*grad.bias};
  return r;
}

int failures = 0;

template <class C>
double largest_error(const std::vector<C>& got, const Vec& want) {
  double error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error = std::isfinite(double(got[i])) ? std::max(error, std::abs(double(got[i]) - want[i])) : INFINITY;
  }
  return error;
}

template <class C>
void expect_near(const std::string& what, const std::vector<C>& got, const Vec& want, double tolerance) {
  const double error = largest_error(got, want);
  double size = 1e-3;
  for (const double x : want) size = std::max(size, std::abs(x));
  if (error <= tolerance * size) return;
  std::printf("FAILED %s: error %.2e of %.2e\n", what.c_str(), error, size);
  ++failures;
}

Vec central_differences(Episode& e, Vec& x, const Vec& weights_z, const Vec& weights_theta) {
  Vec gradient;
  for (double& value : x) {
    const double at = value, h = 1e-6;
    value = at + h;
    const double above = objective(e, weights_z, weights_theta, nullptr);
    value = at - h;
    const double below = objective(e, weights_z, weights_theta, nullptr);
    value = at;
    gradient.push_back((above - below) / (2 * h));
  }
  return gradient;
}

void check(const std::string& name, const Kernels<double>& f64, const Kernels<float>& f32, bool as_labels,
           const Sizes& s, bool from_support, bool running, double lr = 0.02, double along = 0) {
  Episode e(s, from_support, running, lr, along);
  const Vec weights_z = draw(s.T * s.Q * s.N), weights_theta = draw(s.T * s.N * s.D);
  Vec logits;
  objective(e, weights_z, weights_theta, &logits);
  std::vector<std::pair<std::string, Vec>> gradients;
  for (const auto& [name, x] : e.parameters()) {
    gradients.emplace_back(name, central_differences(e, *x, weights_z, weights_theta));
  }
  const Vec grad_query = central_differences(e, e.query, weights_z, weights_theta);
  const Vec grad_start = central_differences(e, e.start, weights_z, weights_theta);

  const std::string where =
      name + " T=" + std::to_string(s.T) + " S=" + std::to_string(s.S) + " Q=" + std::to_string(s.Q) +
      " N=" + std::to_string(s.N) + " D=" + std::to_string(s.D) + " H=" + std::to_string(s.H) +
      " K=" + std::to_string(s.K) + " lr=" + std::to_string(lr) + (running ? " running " : " ");
  const auto compare = [&](const auto& r, double tolerance_out, double tolerance) {
    expect_near(where + "logits", r.logits, logits, tolerance_out);
    expect_near(where + "query", r.grad_query, grad_query, tolerance);
    expect_near(where + "start", r.grad_start, grad_start, tolerance);
    if (from_support) expect_near(where + "weight", r.weight, gradients[0].second, tolerance);
    expect_near(where + "scale", r.scale, gradients[1].second, tolerance);
    expect_near(where + "bias", r.bias, gradients[2].second, tolerance);
    for (size_t i = 0; i < 10; ++i) {
      expect_near(where + gradients[i + 3].first, r.mlp[i], gradients[i + 3].second, tolerance);
    }
  };
  compare(run<double>(f64, e, as_labels, weights_z, weights_theta), 1e-11, 1e-5);
  compare(run<float>(f32, e, as_labels, weights_z, weights_theta), 1e-4, 3e-2);
}

// All sizes and options, with labels sorted beforehand or by the kernels.
[[maybe_unused]] int check_all(const std::string& name, const Kernels<double>& f64, const Kernels<float>& f32,
                               bool as_labels) {
  const auto one = [&](const Sizes& s, bool from_support, bool running) {
    check(name, f64, f32, as_labels, s, from_support, running);
  };
  //    T  S  Q   N  D   H   K
  one({2, 7, 11, 3, 13, 5, 2}, true, false);
  one({1, 2, 1, 2, 1, 1, 1}, true, false);
  one({1, 5, 17, 5, 37, 17, 3}, true, false);
  one({2, 3, 16, 3, 16, 16, 2}, false, false);
  one({1, 6, 9, 6, 33, 8, 0}, true, false);
  one({2, 4, 10, 4, 19, 6, 2}, false, true);
  one({1, 3, 40, 2, 21, 5, 2}, true, false);  // so many rows that the Gram matrix is not formed
  // Steps that cancel.
  check(name, f64, f32, as_labels, {2, 5, 12, 3, 7, 6, 2}, true, false, 0.5, 3);
  check(name, f64, f32, as_labels, {1, 2, 9, 2, 3, 4, 3}, false, true, 0.5, 3);
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}

// Kernels in float that read features stored as F, against kernels in double; theta0 stays wide.
template <class F>
int check_narrow(const std::string& name, const Kernels<double>& right, const Kernels<float>& narrow,
                 const Kernels<float>& wide) {
  const auto one = [&](const Sizes& s, bool from_support) {
    const auto rounding = [](const Results<float>& got, const Results<double>& want) {
      double size = 0;
      for (const double z : want.logits) size = std::max(size, std::abs(z));
      return largest_error(got.logits, want.logits) / size;
    };
    for (int attempt = 0;; ++attempt) {
      Episode e(s, from_support, false, 0.02);
      e.query = rounded<F>(e.query);
      e.start = from_support ? rounded<F>(e.start) : rounded<float>(e.start);
      const Vec weights_z = draw(s.T * s.Q * s.N), weights_theta = draw(s.T * s.N * s.D);
      const auto want = run<double>(right, e, true, weights_z, weights_theta);
      // A hidden unit that few rows pass magnifies rounding, also that of the same rows in float32: another
      // draw.
      if (attempt < 20 && rounding(run<float>(wide, e, true, weights_z, weights_theta), want) > 1e-6)
        continue;
      const auto got = run<float, F>(narrow, e, true, weights_z, weights_theta);
      const std::string where = name + " Q=" + std::to_string(s.Q) + " N=" + std::to_string(s.N) +
                                " D=" + std::to_string(s.D) + " ";
      expect_near(where + "logits", got.logits, want.logits, 1e-5);
      expect_near(where + "query", got.grad_query, want.grad_query, 1e-3);
      expect_near(where + "start", got.grad_start, want.grad_start, 1e-3);
      expect_near(where + "scale", got.scale, want.scale, 1e-3);
      for (size_t i = 0; i < want.mlp.size(); ++i) {
        expect_near(where + "parameter " + std::to_string(i), got.mlp[i], want.mlp[i], 1e-3);
      }
      return;
    }
  };
  //    T  S  Q   N  D   H   K
  one({2, 7, 11, 3, 13, 5, 2}, true);
  one({1, 2, 1, 2, 1, 1, 1}, true);
  one({1, 5, 40, 5, 72, 8, 2}, true);    // a warp for each of three tiles
  one({1, 5, 75, 5, 160, 8, 3}, false);  // the paper's rows: one stack
  one({1, 5, 101, 5, 37, 8, 3}, true);   // more rows than meet at once
  one({1, 4, 90, 3, 66, 6, 4}, false);   // ... with theta0
  std::printf(failures ? "%d failed\n" : "narrow: all passed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace kernelmeta
