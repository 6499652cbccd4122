// What a build for one instruction set offers for programs; see kernel_table.h, which includes this file.
#pragma once

#include "engine/program.h"

namespace kernelmeta {

enum class Start : int64_t { kClassMeans = 0, kLearned = 1, kZero = 2 };

// Rows of tasks that may differ in number: task t owns offsets[t] .. offsets[t + 1] of the rows counted
// through all tasks. Such a row lies in `features`, which is [T][rows][D] where all tasks have as many, else
// [rows][D].
struct TaskRows {
  Features features;
  const int64_t* offsets;  // [T + 1]
  bool even;

  __forceinline__ int64_t count(int64_t t) const { return offsets[t + 1] - offsets[t]; }
};

template <class C>
struct ProgramProblem {
  int64_t T, N, D, H;  // N: of the task that has most
  const Phase* phases;
  int64_t n_phases, K;
  bool cosine, coefficients, first_order;
  TaskRows support, query;
  const int64_t* ways;           // [T]
  const int32_t* members;        // support rows sorted by class: row numbers within the task ...
  const int32_t* class_offsets;  // ... of class n from class_offsets[t][n] on, [T][N + 1]
  Start start;
  const C* theta0;      // [N][D]; learned start
  const C* start_bias;  // [N]; linear
  const C* weight;      // [D] or null; class means
  C scale, bias, target;
  const C* rates;  // [K]
  FoldedMlp<C> mlp;
  const int64_t* trace_offsets;  // [T + 1], in elements

  __forceinline__ ProgramShape shape(int64_t t) const {
    ProgramShape s{support.count(t), query.count(t), ways[t], D,           H, phases, n_phases, K,
                   cosine,           false,          false,   coefficients};
    for (int64_t i = 0; i < n_phases; ++i) {
      if (phases[i].steps > 0) (phases[i].query ? s.uses_query : s.uses_support) = true;
    }
    return s;
  }
};

template <class C>
struct ProgramForward {
  ProgramProblem<C> problem;
  C* logits;                                     // [sum Q][N]
  C *support_coefficients, *query_coefficients;  // [sum S][N], [sum Q][N] or null
  C* start_coefficients;                         // [T][N] or null
  C* trace;                                      // or null
};

// Sums over a chunk of tasks.
template <class C>
struct ProgramGrad {
  C *theta0, *start_bias;  // [N][D], [N]; learned start
  C* weight;               // [D]
  C *scale, *bias, *target;
  C* rates;
  FoldedMlpGrad<C> mlp;

  __forceinline__ ProgramGrad(Arena<C>& arena, const ProgramProblem<C>& p)
      : theta0(arena.take(p.start == Start::kLearned ? p.N * p.D : 0)),
        start_bias(arena.take(p.N)),
        weight(arena.take(p.weight ? p.D : 0)),
        scale(arena.take(1)),
        bias(arena.take(1)),
        target(arena.take(1)),
        rates(arena.take(p.K)),
        mlp(arena, Sizes{1, 1, 1, p.H ? p.N : 0, p.D, p.H, p.K}) {}
};

template <class C>
struct ProgramBackward {
  ProgramProblem<C> problem;
  const C* trace;
  const C* grad_logits;
  const C *grad_support_coefficients, *grad_query_coefficients;  // all three or none
  const C* grad_start_coefficients;
  C *grad_support, *grad_query;  // [sum S][D], [sum Q][D] or null
};

template <class C>
struct ProgramKernels {
  // Elements that the trace of task t takes.
  int64_t (*trace_size)(const ProgramProblem<C>&, int64_t t);
  void (*forward)(const ProgramForward<C>&, int64_t begin, int64_t end);
  // Adds to `grad`, which is zero at the start of a chunk.
  void (*backward)(const ProgramBackward<C>&, const ProgramGrad<C>& grad, int64_t begin, int64_t end);
};

}  // namespace kernelmeta
