// What a build for one instruction set offers for ridge regression; see kernel_table.h, which includes this
// file.
#pragma once

#include "engine/ridge_task.h"

namespace kernelmeta {

template <class C>
struct RidgeKernels {
  // trace_offsets: [T + 1], in elements; singular: [T]
  void (*forward)(const RidgeForward<C>&, const int64_t* trace_offsets, bool* singular, int64_t begin,
                  int64_t end);
  // Adds to `grad`, which is zero at the start of a chunk.
  void (*backward)(const RidgeBackward<C>&, const int64_t* trace_offsets, const RidgeGrad<C>& grad,
                   int64_t begin, int64_t end);
};

}  // namespace kernelmeta
