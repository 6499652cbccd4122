// How fast the CPU Block's words are (csrc/cpu/block.h), one core, in the first-level caches or the second:
//
//   g++ -std=c++20 -O3 -DNDEBUG -fno-math-errno -ffp-contract=fast -mavx2 -mfma -mf16c -I csrc
//   benchmarks/words.cpp -o words
//   ./words
//
// The best of 300 blocks of calls, in counted multiplications (two operations each) a second. Another
// revision's speed is that of this file compiled with -I to its csrc.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/block.h"
#include "engine/features.h"

using namespace kernelmeta;

namespace {

std::vector<float> drawn(int64_t n) {
  std::vector<float> values(n + 64);
  for (float& value : values) value = float(rand()) / float(RAND_MAX) - 0.5f;
  return values;
}

template <class F>
void report(const std::string& what, double multiplications, F run) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int block = 0; block < 300; ++block) {
    const auto start = Clock::now();
    for (int call = 0; call < 3; ++call) run();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count() / 3);
  }
  std::printf("%-32s %9.2f us %7.1f GFLOP/s\n", what.c_str(), best * 1e6, 2 * multiplications / best * 1e-9);
}

}  // namespace

int main() {
  const CpuBlock<float> block;
  const int64_t Q = 75, N = 5, ld = padded(Q);
  for (int64_t D : {64, 640}) {
    auto x = drawn(Q * D), gram = drawn(Q * ld), heads = drawn(N * D), cosines = drawn(N * ld);
    const FeatureRows<float> rows{x.data(), D, nullptr}, of_heads{heads.data(), D, nullptr};
    const std::string sizes = " " + std::to_string(Q) + " rows of " + std::to_string(D);
    report("self_dots:" + sizes, Q * (Q + 1) / 2.0 * D,
           [&] { block.self_dots(Q, rows, D, gram.data(), ld); });
    report("dots: 5 by" + sizes, double(N * Q * D),
           [&] { block.dots(N, of_heads, Q, rows, D, cosines.data(), ld); });
    report("features_mm_add: 5 by" + sizes, double(N * Q * D),
           [&] { block.features_mm_add(N, Q, D, {cosines.data(), ld, 1}, rows, heads.data()); });
  }
  for (int64_t H : {40, 160}) {
    auto w = drawn(H * H), in = drawn((H + 16) * ld), out = drawn(H * ld), bias = drawn(H),
         grad = drawn(H * padded(H));
    const std::string h = std::to_string(H);
    report("mm: " + h + " by " + h, double(H * H * Q),
           [&] { block.mm(H, H, Q, {w.data(), H, 1}, in.data(), ld, out.data(), ld, bias.data()); });
    report("mm: " + h + " by 5", double(H * N * Q),
           [&] { block.mm(H, N, Q, {w.data(), N, 1}, in.data(), ld, out.data(), ld, bias.data()); });
    report("mm: 5 by " + h, double(H * N * Q),
           [&] { block.mm(N, H, Q, {w.data(), H, 1}, in.data(), ld, out.data(), ld, bias.data()); });
    report("outer: " + h + " by " + h, double(H * H * Q),
           [&] { block.outer(H, H, Q, out.data(), ld, in.data(), ld, grad.data(), padded(H)); });
  }
}
