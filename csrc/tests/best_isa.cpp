// Prints the instruction set that is chosen on this machine, from dispatch.cpp itself; the tables are empty.
#include <cstdio>

#include "cpu/dispatch.cpp"

namespace kernelmeta {
#define EACH(name) const KernelTable kernels_##name{.isa = #name};
KERNELMETA_EACH_ISA
#undef EACH
}  // namespace kernelmeta

int main() { std::puts(kernelmeta::choose_kernels(nullptr).isa); }
