// What mma.sync of the PTX ISA takes and gives: the dot products of 16 rows with 8 rows, 8 words of each,
// added in float32. A word is two features of 16 bits (m16n8k16) or one in the TF32 format (m16n8k8). A warp
// holds the operands and the sums in its lanes' registers.
//
// A float32 is the sum of two numbers in TF32, which has 11 of its 24 digits: `high` is the nearest, `low`
// what that leaves, whose last digit may be cut off. A product of two is high * high + (low * high + high *
// low); what is left out, low * low, is below 2^-22 of it.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "engine/portability.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/instructions.h"
#endif

namespace kernelmeta {

// Which words a lane holds. The ISA lets it hold those at lane % 4 and lane % 4 + 4 of a row; here these are
// two neighbours, for both operands, and the 8 rows are in an order of their own, so that rows which lie four
// banks apart are read without conflicts, two words at a time.
struct MmaLanes {
  static constexpr int kCount = 32, kSums = 4, kWords = 8;

  // The bits of 0 to 7 in reverse.
  __host__ __device__ static constexpr int row_of(int i) { return i % 2 * 4 + i / 2 % 2 * 2 + i / 4; }

  // Register r of an operand: a word `at` a row.
  template <int kRows>
  struct Operand {
    static constexpr int kRegisters = kRows / 4;
    __host__ __device__ static constexpr int row(int lane, int r) {
      return row_of(lane / 4) + r % (kRegisters / 2) * 8;
    }
    __host__ __device__ static constexpr int at(int lane, int r) {
      return lane % 4 * 2 + r / (kRegisters / 2);
    }
  };
  using Left = Operand<16>;
  using Right = Operand<8>;
  // Register r of the sums: of a row of the 16 with one of the 8.
  __host__ __device__ static constexpr int sum_left(int lane, int r) { return row_of(lane / 4) + r / 2 * 8; }
  __host__ __device__ static constexpr int sum_right(int lane, int r) { return row_of(lane % 4 * 2 + r % 2); }
};

// Rows of words, `stride` words apart, as `lane` holds them.
template <class Operand>
struct MmaWords {
  uint32_t words[Operand::kRegisters];

  MmaWords() = default;
  KERNELMETA_INLINE MmaWords(const uint32_t* rows, int stride, int lane) {
    struct alignas(8) Two {
      uint32_t v[2];
    };
    constexpr int kHalf = Operand::kRegisters / 2;
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      const Two two =
          *reinterpret_cast<const Two*>(rows + Operand::row(lane, r) * stride + Operand::at(lane, r));
      words[r] = two.v[0];
      words[r + kHalf] = two.v[1];
    }
  }
};

// Rows of features as operands.
template <class F, class Operand>
struct MmaRows : MmaWords<Operand> {
  using MmaWords<Operand>::MmaWords;
};
template <class Operand>
struct MmaRows<float, Operand> {
  uint32_t high[Operand::kRegisters], low[Operand::kRegisters];

  MmaRows() = default;
  KERNELMETA_INLINE MmaRows(const uint32_t* rows, int stride, int lane) {
    constexpr uint32_t kDropped = 0x1fff;  // bits of a float32 that TF32 has not
    const MmaWords<Operand> x(rows, stride, lane);
#pragma unroll
    for (int r = 0; r < Operand::kRegisters; ++r) {
      high[r] = (x.words[r] + (kDropped + 1) / 2) & ~kDropped;
      const float left = std::bit_cast<float>(x.words[r]) - std::bit_cast<float>(high[r]);
      low[r] = std::bit_cast<uint32_t>(left) & ~kDropped;
    }
  }
};
template <class F>
using MmaLeft = MmaRows<F, MmaLanes::Left>;
template <class F>
using MmaRight = MmaRows<F, MmaLanes::Right>;

// Sums of the dot products of rows of `a` with rows of `b`; add() and finish() by a whole warp, the latter
// once after all else. The same for b and a, to the last bit. Tensor cores cut off where they add: they add
// one step's products only, and what is small beside them.
template <class F>
struct MmaSums {
  static constexpr int kValues = MmaLanes::kSums;
  float values[kValues] = {};

  KERNELMETA_INLINE void add([[maybe_unused]] const MmaLeft<F>& a, [[maybe_unused]] const MmaRight<F>& b) {
#ifdef __CUDA_ARCH__
    float of_step[kValues] = {};
    if constexpr (std::is_same_v<F, __nv_bfloat16>)
      mma_m16n8k16_bf16(of_step, a.words, b.words);
    else
      mma_m16n8k16_f16(of_step, a.words, b.words);
#pragma unroll
    for (int r = 0; r < kValues; ++r) values[r] += of_step[r];
#endif
  }
  KERNELMETA_INLINE void finish() {}
};
template <>
struct MmaSums<float> {
  static constexpr int kValues = MmaLanes::kSums;
  float values[kValues] = {}, low_high[kValues] = {}, high_low[kValues] = {};

  KERNELMETA_INLINE void add([[maybe_unused]] const MmaLeft<float>& a,
                             [[maybe_unused]] const MmaRight<float>& b) {
#ifdef __CUDA_ARCH__
    float of_step[kValues] = {};
    mma_m16n8k8_tf32(of_step, a.high, b.high);
    mma_m16n8k8_tf32(low_high, a.low, b.high);
    mma_m16n8k8_tf32(high_low, a.high, b.low);
#pragma unroll
    for (int r = 0; r < kValues; ++r) values[r] += of_step[r];
#endif
  }
  // NaN: a number is beyond TF32, or tensor cores may have kept the sum from becoming infinite.
  KERNELMETA_INLINE void finish() {
#pragma unroll
    for (int r = 0; r < kValues; ++r) {
      const bool in_range = ::fabsf(values[r]) < 0x1p127f;
      values[r] = in_range ? values[r] + (low_high[r] + high_low[r]) : __builtin_nanf("");
    }
  }
};

}  // namespace kernelmeta
