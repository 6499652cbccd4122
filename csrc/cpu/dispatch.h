// Which of the compiled instruction sets runs on this CPU.
#pragma once

#include <vector>

#include "cpu/kernel_table.h"

namespace kernelmeta {

struct InstructionSet {
  const char* name;
  bool runs_here;
  const KernelTable* kernels;
};

// All that were compiled, best first.
const std::vector<InstructionSet>& instruction_sets();

// The kernels named by `wanted`, or the best that run here if `wanted` is null or empty. Throws
// std::invalid_argument if that one was not compiled or does not run on this CPU.
const KernelTable& choose_kernels(const char* wanted);

}  // namespace kernelmeta
