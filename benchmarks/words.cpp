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
#include <new>
#include <string>
#include <vector>

#include "cpu/block.h"
#include "engine/features.h"

using namespace kernelmeta;

namespace {

// As tensors and arenas are: else every other vector lies in two lines of the cache.
template <class T>
struct Aligned {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
};

std::vector<float, Aligned<float>> drawn(int64_t n) {
  std::vector<float, Aligned<float>> values(n + 64);
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
  {  // a layer of a wide perceptron: derivatives of five outputs for 100 rows
    const int64_t H = 256, columns = 500, ldc = padded(columns);
    auto w = drawn(H * H), in = drawn(H * ldc), out = drawn(H * ldc), grad = drawn(H * H);
    const std::string h = std::to_string(H) + " by " + std::to_string(H);
    report("mm: " + h + ", 500 columns", double(H * H * columns),
           [&] { block.mm(H, H, columns, {w.data(), H, 1}, in.data(), ldc, out.data(), ldc, nullptr); });
    report("mm: transposed, " + h + ", 500 columns", double(H * H * columns),
           [&] { block.mm(H, H, columns, {w.data(), 1, H}, in.data(), ldc, out.data(), ldc, nullptr); });
    report("outer: " + h + ", 500 columns", double(H * H * columns),
           [&] { block.outer(H, H, columns, out.data(), ldc, in.data(), ldc, grad.data(), H); });
    const int64_t D = 640, rows = 100, ldr = padded(rows);
    auto x = drawn(rows * D), first = drawn(H * D), sums = drawn(H * D);
    const FeatureRows<float> of_x{x.data(), D, nullptr}, of_first{first.data(), D, nullptr};
    report("dots: 256 by 100 rows of 640", double(H * rows * D),
           [&] { block.dots(H, of_first, rows, of_x, D, out.data(), ldr); });
    report("features_mm_add: 256 by 100 rows", double(H * rows * D),
           [&] { block.features_mm_add(H, rows, D, {out.data(), ldr, 1}, of_x, sums.data()); });
    report("features_mm_add: 100 by 256 rows", double(H * rows * D),
           [&] { block.features_mm_add(rows, H, D, {out.data(), 1, ldr}, of_first, x.data()); });
  }
  {  // heads of twenty classes and their 300 query rows
    const int64_t Q = 300, D = 640, ways = 20, ldq = padded(Q);
    auto x = drawn(Q * D), heads = drawn(ways * D), cosines = drawn(ways * ldq);
    const FeatureRows<float> rows{x.data(), D, nullptr}, of_heads{heads.data(), D, nullptr};
    report("dots: 20 by 300 rows of 640", double(ways * Q * D),
           [&] { block.dots(ways, of_heads, Q, rows, D, cosines.data(), ldq); });
    report("features_mm_add: 20 by 300 rows", double(ways * Q * D),
           [&] { block.features_mm_add(ways, Q, D, {cosines.data(), ldq, 1}, rows, heads.data()); });
  }
}
