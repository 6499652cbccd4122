// What a build for one instruction set offers for programs; see kernel_table.h, which includes this file.
#pragma once

#include "engine/program_task.h"

namespace kernelmeta {

// What is made ready once a call.
template <class C>
struct ProgramCall {
  const Phase* phases;
  FoldedMlp<C> mlp;
  const int64_t* trace_offsets;  // [T + 1], in elements
};

template <class C>
struct ProgramKernels {
  void (*forward)(const ProgramForward<C>&, const ProgramCall<C>&, int64_t begin, int64_t end);
  // Adds to `grad`, which is zero at the start of a chunk.
  void (*backward)(const ProgramBackward<C>&, const ProgramCall<C>&, const ProgramGrad<C>& grad,
                   int64_t begin, int64_t end);
};

}  // namespace kernelmeta
