// Stands in for csrc/cuda/instructions.h where kernels run lane by lane.
#pragma once

#include "cuda/source_line.h"
#include "lanes/machine.h"

namespace kernelmeta {

inline void sync_block(SourceLine line) { lanes::block_barrier({line.file, line.line}); }
inline void sync_lanes(SourceLine line) { lanes::warp_barrier({line.file, line.line}); }

inline void copy_async_16(const void* from, void* to) { lanes::copy_async_16(from, to); }
inline void commit_copies() { lanes::commit_copies(); }
template <int kGroups>
void wait_for_all_copies_but() {
  lanes::wait_for_all_copies_but(kGroups);
}

inline void mma_m16n8k16_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lanes::mma_m16n8k16(sums, a, b, lanes::of_bfloat16);
}
inline void mma_m16n8k16_f16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lanes::mma_m16n8k16(sums, a, b, lanes::of_float16);
}
inline void mma_m16n8k8_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lanes::mma_m16n8k8_tf32(sums, a, b);
}

}  // namespace kernelmeta
