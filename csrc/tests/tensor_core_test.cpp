// The lanes' registers as csrc/cuda/tensor_core.h fills and reads them, multiplied as the PTX ISA says that
// mma.sync.m16n8k16 does ("Matrix fragments for mma.m16n8k16 with floating point type"), give the products.
#include "cuda/tensor_core.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/narrow_float.h"

namespace {

using namespace kernelmeta;

constexpr int kStride = 24;

// Element i of a lane's operand: two in a register, the first in its low half.
template <class F>
float element(const uint32_t* pairs, int i) {
  F x;
  x.bits = uint16_t(pairs[i / 2] >> (i % 2 * 16));
  return float(x);
}

// d += a b, with a [16][16], b [16][8]; groupID and threadID_in_group as the ISA names them.
template <class F>
void mma_of_isa(float (&sums)[32][4], const std::vector<MmaLeft<F>>& left,
                const std::vector<MmaRight<F>>& right) {
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int groupID = lane >> 2, threadID_in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
      const int column = i < 4 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
      a[row][column] = element<F>(left[size_t(lane)].pairs, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
      b[row][groupID] = element<F>(right[size_t(lane)].pairs, i);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int groupID = lane >> 2, threadID_in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      sums[lane][i] += d[i < 2 ? groupID : groupID + 8][threadID_in_group * 2 + (i & 1)];
    }
  }
}

template <class F>
int check(const char* name) {
  std::mt19937 generator(0);
  std::uniform_int_distribution<int> uniform(-8, 8);  // exact in every precision
  alignas(4) F x[16 * kStride], y[8 * kStride];
  for (F& v : x) v = F(float(uniform(generator)));
  for (F& v : y) v = F(float(uniform(generator)));
  std::vector<MmaLeft<F>> left;
  std::vector<MmaRight<F>> right;
  for (int lane = 0; lane < MmaLanes::kCount; ++lane) {
    left.emplace_back(x, kStride, lane);
    right.emplace_back(y, kStride, lane);
  }
  float sums[32][4] = {};
  mma_of_isa(sums, left, right);
  int failed = 0, seen[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < MmaLanes::kSums; ++r) {
      const int i = MmaLanes::sum_left(lane, r), j = MmaLanes::sum_right(lane, r);
      ++seen[i][j];
      float want = 0;
      for (int k = 0; k < 16; ++k) want += float(x[i * kStride + k]) * float(y[j * kStride + k]);
      if (sums[lane][r] == want) continue;
      std::printf("FAILED %s: rows %d and %d: %g, not %g\n", name, i, j, double(sums[lane][r]), double(want));
      ++failed;
    }
  }
  for (const auto& row : seen) {
    for (const int count : row) failed += count != 1;
  }
  return failed;
}

// What a GPU rounds to 16 bits, so do the tests' own types.
int check_rounding() {
  int failed = 0;
  const auto expect = [&](float got, float want) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    std::printf("FAILED: rounded to %g, not %g\n", double(got), double(want));
    ++failed;
  };
  expect(float(Half(1 + 0x1p-11f)), 1);              // a tie
  expect(float(Half(1 + 0x1.8p-10f)), 1 + 0x1p-9f);  // the other tie
  expect(float(Half(65519)), 65504);                 // the largest
  expect(float(Half(65520)), INFINITY);
  expect(float(Half(-0x1.4p-23f)), -0x1p-23f);  // subnormal
  expect(float(Half(NAN)), NAN);
  expect(float(BrainFloat(1 + 0x1p-8f)), 1);
  expect(float(BrainFloat(-1 - 0x1.8p-7f)), -1 - 0x1p-6f);
  expect(float(BrainFloat(0x1p-133f)), 0x1p-133f);
  expect(float(BrainFloat(INFINITY)), INFINITY);
  for (int bits = 0; bits < 0x10000; ++bits) {
    Half h;
    h.bits = uint16_t(bits);
    BrainFloat b;
    b.bits = uint16_t(bits);
    if (!std::isnan(float(h))) failed += Half(float(h)).bits != bits;
    if (!std::isnan(float(b))) failed += BrainFloat(float(b)).bits != bits;
  }
  return failed;
}

}  // namespace

int main() { return check<BrainFloat>("bfloat16") + check<Half>("float16") + check_rounding() != 0; }
