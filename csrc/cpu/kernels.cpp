// The CPU kernels. Compiled once for each instruction set, with KERNELMETA_ISA=avx2 and so on.
//
// Everything here stands in an anonymous namespace and no std:: template is instantiated: a weak symbol
// compiled for AVX-512 might be the one that the linker keeps for every instruction set.
#include "cpu/kernel_table.h"

#define KERNELMETA_STRING_(name) #name
#define KERNELMETA_STRING(name) KERNELMETA_STRING_(name)
#define KERNELMETA_ENTRY_(isa) kernelmeta_kernels_##isa
#define KERNELMETA_ENTRY(isa) KERNELMETA_ENTRY_(isa)

namespace {

void copy(const char* from, char* to, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; ++i) {
    to[i] = from[i];
  }
}

constexpr kernelmeta::cpu::KernelTable kTable = {KERNELMETA_STRING(KERNELMETA_ISA), &copy};

}  // namespace

extern "C" const kernelmeta::cpu::KernelTable* KERNELMETA_ENTRY(KERNELMETA_ISA)() {
  return &kTable;
}
