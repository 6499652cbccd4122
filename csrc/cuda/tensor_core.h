// What mma.sync.m16n8k16 of the PTX ISA takes and gives: the products of 16 rows with 8 rows, 16 elements of
// 16 bits each, added in float32. A warp holds the operands and the sums in its lanes' registers.
#pragma once

#include <type_traits>

#include "engine/portability.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/instructions.h"
#endif

namespace kernelmeta {

// Which elements a lane holds: register r of an operand has two, `at` and at + 1 of a row.
struct MmaLanes {
  static constexpr int kCount = 32, kSums = 4;

  // Of the 16 rows.
  struct Left {
    static constexpr int kRegisters = 4;
    __host__ __device__ static constexpr int row(int lane, int r) { return lane / 4 + r % 2 * 8; }
    __host__ __device__ static constexpr int at(int lane, int r) { return lane % 4 * 2 + r / 2 * 8; }
  };
  // Of the 8 rows.
  struct Right {
    static constexpr int kRegisters = 2;
    __host__ __device__ static constexpr int row(int lane, int) { return lane / 4; }
    __host__ __device__ static constexpr int at(int lane, int r) { return lane % 4 * 2 + r * 8; }
  };
  // Register r of the sums: of a row of the 16 with one of the 8.
  __host__ __device__ static constexpr int sum_left(int lane, int r) { return lane / 4 + r / 2 * 8; }
  __host__ __device__ static constexpr int sum_right(int lane, int r) { return lane % 4 * 2 + r % 2; }
};

// Two neighbours, the first in the low bits; the address is a multiple of 4 bytes.
template <class F>
KERNELMETA_INLINE uint32_t pair_at(const F* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}

// Rows, `stride` elements apart, as `lane` holds them.
template <class F, class Operand>
struct MmaRows {
  uint32_t pairs[Operand::kRegisters];

  MmaRows() = default;
  KERNELMETA_INLINE MmaRows(const F* rows, int stride, int lane) {
#pragma unroll
    for (int r = 0; r < Operand::kRegisters; ++r) {
      pairs[r] = pair_at(rows + Operand::row(lane, r) * stride + Operand::at(lane, r));
    }
  }
};
template <class F>
using MmaLeft = MmaRows<F, MmaLanes::Left>;
template <class F>
using MmaRight = MmaRows<F, MmaLanes::Right>;

#ifdef __CUDACC__
// sums += the dot products of the rows of `a` with those of `b`; by a whole warp.
template <class F>
__device__ __forceinline__ void mma(float (&sums)[MmaLanes::kSums], const MmaLeft<F>& a,
                                    const MmaRight<F>& b) {
  static_assert(std::is_same_v<F, __nv_bfloat16> || std::is_same_v<F, __half>);
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, __nv_bfloat16>)
    mma_m16n8k16_bf16(sums, a.pairs, b.pairs);
  else
    mma_m16n8k16_f16(sums, a.pairs, b.pairs);
#endif
}
#endif

}  // namespace kernelmeta
