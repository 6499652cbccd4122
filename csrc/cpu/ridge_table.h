// What a build for one instruction set offers for ridge regression; see kernel_table.h, which includes this
// file.
#pragma once

#include "cpu/program_table.h"

namespace kernelmeta {

template <class C>
struct RidgeProblem {
  int64_t T, N, D;  // N: of the task that has most
  TaskRows support, query;
  const int64_t* ways;           // [T]
  const int32_t* members;        // as in ProgramProblem
  const int32_t* class_offsets;  // [T][N + 1]
  C lambda, scale, bias;
  const int64_t* trace_offsets;  // [T + 1], in elements

  __forceinline__ Sizes sizes(int64_t t) const {
    return {1, support.count(t), query.count(t), ways[t], D, 0, 0};
  }
};

template <class C>
struct RidgeForward {
  RidgeProblem<C> problem;
  C* logits;        // [sum Q][N]
  C* coefficients;  // [sum S][N]
  C* trace;         // or null
  bool* singular;   // [T]
};

// Sums over a chunk of tasks.
template <class C>
struct RidgeGrad {
  C *lambda, *scale, *bias;

  __forceinline__ explicit RidgeGrad(Arena<C>& arena)
      : lambda(arena.take(1)), scale(arena.take(1)), bias(arena.take(1)) {}
};

template <class C>
struct RidgeBackward {
  RidgeProblem<C> problem;
  const C* trace;
  const C* grad_logits;
  const C* grad_coefficients;    // [sum S][N] or null
  C *grad_support, *grad_query;  // or null
};

template <class C>
struct RidgeKernels {
  int64_t (*trace_size)(const RidgeProblem<C>&, int64_t t);
  void (*forward)(const RidgeForward<C>&, int64_t begin, int64_t end);
  void (*backward)(const RidgeBackward<C>&, const RidgeGrad<C>& grad, int64_t begin, int64_t end);
};

}  // namespace kernelmeta
