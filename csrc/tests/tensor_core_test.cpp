// The lanes' registers as csrc/cuda/tensor_core.h fills and reads them, multiplied as the PTX ISA says that
// mma.sync does ("Matrix fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8"), give
// the products.
#include "cuda/tensor_core.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "tests/narrow_float.h"

namespace {

using namespace kernelmeta;

constexpr int kWords = MmaLanes::kWords, kStride = 12;  // of a row, in words

// Element i of a lane's operand of 16 bits: two in a register, the first in its low half.
template <class F>
float element(const uint32_t* words, int i) {
  F x;
  x.bits = uint16_t(words[i / 2] >> (i % 2 * 16));
  return float(x);
}

// d += a b, with a [16][16], b [16][8]; groupID and threadID_in_group as the ISA names them.
template <class F>
void mma_m16n8k16_of_isa(float (&d)[16][8], const std::vector<MmaLeft<F>>& left,
                         const std::vector<MmaRight<F>>& right) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int groupID = lane >> 2, threadID_in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
      const int column = i < 4 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
      a[row][column] = element<F>(left[size_t(lane)].words, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
      b[row][groupID] = element<F>(right[size_t(lane)].words, i);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) d[i][j] += a[i][k] * b[k][j];
    }
  }
}

// d += a b, with a [16][8], b [8][8] of .tf32; of(x): a lane's registers, which are numbers in TF32.
template <class OfLeft, class OfRight>
void mma_m16n8k8_of_isa(float (&d)[16][8], const std::vector<MmaLeft<float>>& left,
                        const std::vector<MmaRight<float>>& right, OfLeft of_left, OfRight of_right) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int groupID = lane >> 2, threadID_in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 || i == 2 ? groupID : groupID + 8;
      const int column = i < 2 ? threadID_in_group : threadID_in_group + 4;
      a[row][column] = std::bit_cast<float>(of_left(left[size_t(lane)])[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[threadID_in_group + i * 4][groupID] = std::bit_cast<float>(of_right(right[size_t(lane)])[i]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 8; ++k) d[i][j] += a[i][k] * b[k][j];
    }
  }
}

template <class F>
void multiply(float (&d)[16][8], const std::vector<MmaLeft<F>>& left, const std::vector<MmaRight<F>>& right) {
  if constexpr (sizeof(F) == 2) {
    mma_m16n8k16_of_isa(d, left, right);
  } else {
    const auto high = [](const auto& x) { return x.high; };
    const auto low = [](const auto& x) { return x.low; };
    mma_m16n8k8_of_isa(d, left, right, high, high);
    mma_m16n8k8_of_isa(d, left, right, low, high);
    mma_m16n8k8_of_isa(d, left, right, high, low);
  }
}

template <class F>
int check(const char* name) {
  constexpr int kFeatures = kWords * 4 / int(sizeof(F)), kRow = kStride * 4 / int(sizeof(F));
  std::mt19937 generator(0);
  std::uniform_int_distribution<int> uniform(-8, 8);  // exact in every precision
  alignas(8) F x[16 * kRow], y[8 * kRow];
  // In float32, of two parts each; what is left of their products is exact as well.
  for (F& v : x)
    v = F(float(uniform(generator)) + (sizeof(F) == 4 ? 0x1p-11f * float(uniform(generator)) : 0));
  for (F& v : y) v = F(float(uniform(generator)));
  uint32_t words_of_x[16 * kStride], words_of_y[8 * kStride];
  std::memcpy(words_of_x, x, sizeof(x));
  std::memcpy(words_of_y, y, sizeof(y));
  std::vector<MmaLeft<F>> left;
  std::vector<MmaRight<F>> right;
  for (int lane = 0; lane < MmaLanes::kCount; ++lane) {
    left.emplace_back(words_of_x, kStride, lane);
    right.emplace_back(words_of_y, kStride, lane);
  }
  float d[16][8] = {};
  multiply<F>(d, left, right);
  int failed = 0, seen[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int groupID = lane >> 2, threadID_in_group = lane % 4;
    for (int r = 0; r < MmaLanes::kSums; ++r) {
      const int i = MmaLanes::sum_left(lane, r), j = MmaLanes::sum_right(lane, r);
      ++seen[i][j];
      const float got = d[r < 2 ? groupID : groupID + 8][threadID_in_group * 2 + (r & 1)];
      float want = 0;
      for (int k = 0; k < kFeatures; ++k) want += float(x[i * kRow + k]) * float(y[j * kRow + k]);
      if (got == want) continue;
      std::printf("FAILED %s: rows %d and %d: %g, not %g\n", name, i, j, double(got), double(want));
      ++failed;
    }
  }
  for (const auto& row : seen) {
    for (const int count : row) failed += count != 1;
  }
  return failed;
}

// The parts of a float32 are numbers in TF32, and all of it but for its last digit.
int check_parts() {
  std::mt19937 generator(1);
  int failed = 0;
  for (int draw = 0; draw < 100000; ++draw) {
    uint32_t bits[8 * kStride] = {};
    bits[0] = generator();
    const float x = std::bit_cast<float>(bits[0]);
    const MmaRight<float> parts(bits, kStride, 0);
    const float high = std::bit_cast<float>(parts.high[0]), low = std::bit_cast<float>(parts.low[0]);
    failed += parts.high[0] % 0x2000 != 0 || parts.low[0] % 0x2000 != 0;
    if (!(std::fabs(x) < 0x1.ffep127f)) {  // beyond TF32, infinite or NaN: so are they
      failed += std::isfinite(high) && std::isfinite(low);
      continue;
    }
    const double left = double(x) - double(high) - double(low);
    failed += std::fabs(double(x) - double(high)) > std::ldexp(std::fabs(double(x)), -11) + 0x1p-137;
    failed += std::fabs(left) > std::ldexp(std::fabs(double(x)), -23) + 0x1p-136;
  }
  if (failed) std::printf("FAILED: %d wrong parts in TF32\n", failed);
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

int main() {
  return check<BrainFloat>("bfloat16") + check<Half>("float16") + check<float>("float32") + check_parts() +
             check_rounding() !=
         0;
}
