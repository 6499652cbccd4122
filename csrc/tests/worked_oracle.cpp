// The oracle that docs/programs.md adds as its example, in a copy of the sources to which it was added
// (tests/test_oracles.py): against its loss, and on a CPU core against the CUDA kernels, executed lane by
// lane.
#include "tests/lane_kernels.h"

#include "cpu/block.h"
#include "cpu/program_kernels.h"

using namespace kernelmeta;

namespace kernelmeta {
void* scratch(int64_t bytes) {
  static std::vector<double> memory;
  memory.resize(size_t(bytes) / sizeof(double) + 8);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}
}  // namespace kernelmeta

namespace {

constexpr int64_t kWays = 3, kRows = 5, kLd = 16;

// -|softmax(z)|^2 / 2, averaged over the rows.
double loss(const Vec& z) {
  double total = 0;
  for (int64_t q = 0; q < kRows; ++q) {
    double sum = 0, square = 0;
    for (int64_t n = 0; n < kWays; ++n) sum += std::exp(z[size_t(n * kLd + q)]);
    for (int64_t n = 0; n < kWays; ++n) square += std::pow(std::exp(z[size_t(n * kLd + q)]) / sum, 2);
    total -= square / 2 / double(kRows);
  }
  return total;
}

// The derivative of f at z.
template <class F>
Vec differences(F f, Vec z) {
  Vec gradient(z.size());
  for (size_t i = 0; i < z.size(); ++i) {
    const double at = z[i], h = 1e-6;
    z[i] = at + h;
    const double above = f(z);
    z[i] = at - h;
    gradient[i] = (above - f(z)) / (2 * h);
    z[i] = at;
  }
  return gradient;
}

void check_derivatives() {
  CpuBlock<double> block;
  const OracleRows<CpuBlock<double>> rows{block, kWays, kRows, kLd, nullptr, 1.0 / kRows, double(kRows), 1};
  const auto forward = [&](const Vec& z) {
    Vec g(z.size());
    with_oracle(Oracle::kCollision, [&](auto oracle) { oracle.forward(rows, z.data(), g.data()); });
    return g;
  };
  const Vec z = draw(kWays * kLd, -2, 2), gg = draw(kWays * kLd);
  expect_near("G", forward(z), differences(loss, z), 1e-7);
  Vec gz(z.size());
  const Vec g = forward(z);
  with_oracle(Oracle::kCollision,
              [&](auto oracle) { oracle.backward(rows, z.data(), g.data(), gg.data(), gz.data()); });
  const auto along = [&](const Vec& at) {
    const Vec of = forward(at);
    double sum = 0;
    for (int64_t n = 0; n < kWays; ++n) {
      for (int64_t q = 0; q < kRows; ++q) sum += of[size_t(n * kLd + q)] * gg[size_t(n * kLd + q)];
    }
    return sum;
  };
  expect_near("gradient of Z", gz, differences(along, z), 1e-7);
}

}  // namespace

int main() {
  check_derivatives();
  KernelTable cpu{}, lanes{};
  cpu.f64.program_forward = program_forward<double>;
  cpu.f64.program_backward = program_backward<double>;
  lanes.f64.program_forward = lane_program_forward<double>;
  lanes.f64.program_backward = lane_program_backward<double>;
  const ProgramCase added{
      "collision",       13, 3, 0, {7, 7}, {11, 11}, {3, 3}, {{Oracle::kCollision, true, true, 3}}, true,
      Start::kClassMeans};
  const ProgramEpisode episode(added);
  compare_named("collision", episode.run<double>(lanes), episode.run<double>(cpu), 1e-10);
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
