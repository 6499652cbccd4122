// What a compiled instruction set offers: one pointer a kernel. Plain pointers and sizes only, so that
// no type with inline functions crosses the border between instruction sets.
#pragma once

#include <cstdint>

namespace kernelmeta::cpu {

struct KernelTable {
  const char* isa;  // "avx512", "avx2", "sse2", "neon", "generic"

  // to[0 .. n_bytes) = from[0 .. n_bytes): the kernel of the do-nothing op.
  void (*copy)(const char* from, char* to, int64_t n_bytes);
};

}  // namespace kernelmeta::cpu
