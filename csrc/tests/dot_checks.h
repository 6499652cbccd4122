// Dot products on the tensor cores, lane by lane: as exact as float32 arithmetic, the same bits for equal
// rows, and whatever numbers a row holds.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "cuda/kernel.cuh"
#include "tests/lane_kernels.h"

namespace kernelmeta {
namespace {

template <class F>
using DotBlock = TeamBlock<CudaTeam<cuda::kThreads<float>>, float, F, Sizes>;

template <class F>
void stacked_kernel(const F* x, int64_t Q, const float* theta0, int64_t N, int64_t D, float* gram,
                    float* cross, int64_t ld, float* squares) {
  DotBlock<F>().stacked_dots(Q, FeatureRows<F>{x, D, nullptr}, N, theta0, D, gram, cross, ld, squares);
}
template <class F>
void dots_kernel(const F* a, int64_t m, const F* b, int64_t n, int64_t D, float* out, int64_t ldo) {
  DotBlock<F>().dots(m, FeatureRows<F>{a, D, nullptr}, n, FeatureRows<F>{b, D, nullptr}, D, out, ldo);
}

// Q rows of D features, then N rows of theta0, and their products as the kernels find them: all pairs of a
// stack, and of its rows with the features as two operands.
template <class F>
struct DotRows {
  int64_t Q, N, D;
  std::vector<float> values;  // [Q + N][D]
  std::vector<float> gram, cross, squares, others;

  DotRows(int64_t Q, int64_t N, int64_t D) : Q(Q), N(N), D(D), values(size_t((Q + N) * D)) {}

  float* row(int64_t i) { return values.data() + i * D; }
  // <row i, row j>; j <= i
  float got(int64_t i, int64_t j) const {
    if (i < Q) return gram[size_t(i * Q + j)];
    return j < Q ? cross[size_t((i - Q) * Q + j)] : squares[size_t(i - Q)];
  }
  double exact(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d)
      sum += double(values[size_t(i * D + d)]) * double(values[size_t(j * D + d)]);
    return sum;
  }
  // One feature after the other, as a matrix product's.
  float plain(int64_t i, int64_t j) const {
    float sum = 0;
    for (int64_t d = 0; d < D; ++d) sum = std::fma(values[size_t(i * D + d)], values[size_t(j * D + d)], sum);
    return sum;
  }

  void run() {
    LaneMemory<F> x(Q * D);
    LaneMemory<float> theta0(N * D), to_gram(Q * Q), to_cross(N * Q), to_squares(N), to_others(Q * Q);
    for (int64_t i = 0; i < Q * D; ++i) {
      x[i] = F(values[size_t(i)]);
      values[size_t(i)] = float(x[i]);
    }
    std::copy(values.begin() + Q * D, values.end(), static_cast<float*>(theta0));
    cuda::Plan plan;
    plan.blocks = 1;
    plan.shared_bytes = Staging<float>::kElements * int64_t(sizeof(float));
    const auto launch = [&](auto kernel, auto... args) {
      cuda::launch<DotBlock<F>>("dots", kernel, plan, lane_stream, args...);
    };
    const F* const rows = x;
    lanes::count_as("dots");
    launch(&stacked_kernel<F>, rows, Q, static_cast<const float*>(theta0), N, D, static_cast<float*>(to_gram),
           static_cast<float*>(to_cross), Q, static_cast<float*>(to_squares));
    launch(&dots_kernel<F>, rows, Q, rows, Q, D, static_cast<float*>(to_others), Q);
    const auto keep = [](float* from, int64_t n) { return std::vector<float>(from, from + n); };
    gram = keep(to_gram, Q * Q);
    cross = keep(to_cross, N * Q);
    squares = keep(to_squares, N);
    others = keep(to_others, Q * Q);
  }

  // f(got, exact, plain, |row i| |row j|) of all pairs that were multiplied.
  template <class Fn>
  void each_pair(Fn f) const {
    for (int64_t i = 0; i < Q + N; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        if (i != j && j >= Q) continue;
        const double size = std::sqrt(exact(i, i) * exact(j, j));
        f(got(i, j), exact(i, j), plain(i, j), size);
        if (i < Q) f(others[size_t(i * Q + j)], exact(i, j), plain(i, j), size);
      }
    }
  }
};

void expect_of_dots(const std::string& what, bool holds) {
  if (!holds) std::printf("FAILED: %s\n", what.c_str());
  failures += !holds;
}

bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// Of rows that are drawn, as they are or all positive.
template <class F>
void check_dot_errors(const std::string& name, int64_t Q, int64_t N, int64_t D, bool positive) {
  DotRows<F> rows(Q, N, D);
  std::normal_distribution<double> normal;
  for (float& x : rows.values) x = float(positive ? std::fabs(normal(generator)) : normal(generator));
  for (int64_t d = 0; d < D; ++d) {  // two equal rows, and a theta0 equal to them
    const float x = float(F(rows.row(1)[d]));
    rows.row(1)[d] = rows.row(Q - 1)[d] = x;
    if (N > 0) rows.row(Q)[d] = x;
  }
  rows.run();
  double error = 0, of_plain = 0;
  rows.each_pair([&](float got, double exact, float plain, double size) {
    error = std::fmax(error, std::fabs(double(got) - exact) / size);
    of_plain = std::fmax(of_plain, std::fabs(double(plain) - exact) / size);
  });
  const std::string what = name + " dots of " + std::to_string(Q) + " + " + std::to_string(N) + " rows of " +
                           std::to_string(D) + (positive ? " positive features" : " features");
  std::printf("%s: errors of up to %.1f, by float32 arithmetic %.1f\n", what.c_str(), error * 0x1p24,
              of_plain * 0x1p24);
  expect_of_dots(what, error <= 2 * of_plain);
  bool equal = true;
  for (int64_t j = 0; j < Q; ++j) {
    equal = equal && same_bits(rows.gram[size_t(Q + j)], rows.gram[size_t((Q - 1) * Q + j)]);
    equal = equal && same_bits(rows.others[size_t(Q + j)], rows.others[size_t((Q - 1) * Q + j)]);
    if (N > 0 && sizeof(F) == 4) equal = equal && same_bits(rows.gram[size_t(Q + j)], rows.cross[size_t(j)]);
  }
  if (N > 0 && sizeof(F) == 4) equal = equal && same_bits(rows.gram[size_t(Q + 1)], rows.squares[0]);
  for (int64_t i = 0; i < Q; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      equal = equal && same_bits(rows.others[size_t(i * Q + j)], rows.others[size_t(j * Q + i)]);
    }
  }
  expect_of_dots(what + ": the same bits for equal rows, and in both orders", equal);
}

// Numbers at the ends of float32's range: whatever a float32 sum would be.
void check_dot_extremes() {
  constexpr float kMax = std::numeric_limits<float>::max(), kInf = std::numeric_limits<float>::infinity();
  const float heads[][2] = {{kMax, 0},
                            {0.25f, 0},
                            {-kMax, kMax},
                            {1e20f, 1},
                            {kInf, 0},
                            {NAN, 1},
                            {-kInf, 2},
                            {0x1p-126f, 0x1p-140f},
                            {0x1p100f, 0x1p13f},
                            {0x1.fffffep-5f, 3e-39f},
                            {1, 1},
                            {0x1.ffep127f, 0x1p-20f}};
  for (const int64_t Q : {int64_t(std::size(heads)), int64_t(100)}) {
    DotRows<float> rows(Q, 1, 40);
    for (int64_t i = 0; i <= Q; ++i)
      std::copy(heads[i % int64_t(std::size(heads))], heads[i % int64_t(std::size(heads))] + 2,
                rows.row(i) + 7);
    rows.run();
    bool right = true;
    rows.each_pair([&](float got, double exact, float plain, double) {
      const bool as_exact = std::fabs(double(got) - exact) <= 0x1p-20 * std::fabs(exact) + 0x1p-136;
      const bool as_plain = std::isnan(plain) ? std::isnan(got) : std::isinf(plain) && got == plain;
      if (!as_exact && !as_plain) std::printf("%g, not %g or %g\n", double(got), exact, double(plain));
      right = right && (as_exact || as_plain);
    });
    expect_of_dots("dots of " + std::to_string(Q) + " rows with extreme numbers", right);
  }
}

template <class F>
void check_dots(const std::string& name) {
  for (const bool positive : {false, true}) {
    check_dot_errors<F>(name, 75, 5, 640, positive);
    check_dot_errors<F>(name, 75, 5, 160, positive);  // the last chunk at the end of the stage
    check_dot_errors<F>(name, 96, 0, 64, positive);
    check_dot_errors<F>(name, 70, 26, 40, positive);
    check_dot_errors<F>(name, 100, 3, 35, positive);  // rows that do not begin at multiples of 16 bytes
    check_dot_errors<F>(name, 40, 8, 21, positive);
    check_dot_errors<F>(name, 60, 12, 20, positive);  // fewer features than that, by float32 arithmetic
    check_dot_errors<F>(name, 40, 20, 13, positive);
    check_dot_errors<F>(name, 3, 1, 1, positive);
  }
}

}  // namespace
}  // namespace kernelmeta
