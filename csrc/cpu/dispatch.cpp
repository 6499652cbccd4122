#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "engine/out_of_memory.h"

namespace kernelmeta {

// KERNELMETA_EACH_ISA is EACH(avx512)EACH(avx2)... : one table in each object file of kernels.cpp.
#define EACH(isa) extern const KernelTable kernels_##isa;
KERNELMETA_EACH_ISA
#undef EACH

namespace {

bool runs_here(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(isa, "avx2") == 0) {
    // F16C comes with every CPU that has AVX2; older compilers do not know its name here.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#else
  (void)isa;
#endif
  return true;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all = {
#define EACH(isa) {#isa, runs_here(#isa), &kernels_##isa},
      KERNELMETA_EACH_ISA
#undef EACH
  };
  return all;
}

const KernelTable& choose_kernels(const char* wanted) {
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string compiled;
  for (const InstructionSet& candidate : instruction_sets()) {
    if (any ? candidate.runs_here : std::strcmp(wanted, candidate.name) == 0) {
      if (!candidate.runs_here) {
        throw std::invalid_argument(std::string("KERNELMETA_ISA=") + wanted +
                                    ": this CPU cannot run these instructions");
      }
      return *candidate.kernels;
    }
    compiled += (compiled.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument(std::string("KERNELMETA_ISA=") + (any ? "" : wanted) +
                              ": not among the compiled instruction sets (" + compiled + ")");
}

const KernelTable& kernel_table() {
  static const KernelTable& chosen = choose_kernels(std::getenv("KERNELMETA_ISA"));
  return chosen;
}

void* scratch(int64_t bytes) {
  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    int64_t size = 0;
  };
  thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const int64_t size = (bytes + 63) / 64 * 64;
    buffer.size = 0;
    buffer.memory.reset();
    buffer.memory.reset(std::aligned_alloc(64, static_cast<size_t>(size)));
    if (!buffer.memory) throw OutOfMemory("no memory for " + std::to_string(size) + " bytes of scratch");
    buffer.size = size;
  }
#ifdef KERNELMETA_POISON
  std::memset(buffer.memory.get(), 0xff, static_cast<size_t>(bytes));  // NaN in every precision
#endif
  return buffer.memory.get();
}

}  // namespace kernelmeta
