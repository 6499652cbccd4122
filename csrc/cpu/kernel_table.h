// What a build for one instruction set offers: functions over a range of tasks, for float and for double.
// Plain structs of pointers; whoever calls has checked every shape. All offsets are in elements.
#pragma once

#include "engine/features.h"

namespace kernelmeta {

enum class Storage : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Feature rows of all tasks as they come from outside; row i of task t is data[t * task + i * row], or, with
// an index [T][rows], data[index[t][i] * row].
struct Features {
  const void* data;
  Storage storage;
  int64_t rows;  // per task
  int64_t task, row;
  const int64_t* index;
};

// Support rows sorted by class, per task; see ClassMembers.
struct ClassTable {
  const int32_t* members;  // [T][S], null where theta0 is given instead of support rows
  const int32_t* offsets;  // [T][N + 1]
};

template <class C>
struct SibProblem {
  Sizes s;
  Features query;
  Features start;  // support rows, or theta0 [T][N][D]
  ClassTable classes;
  const C* weight;  // [D] or null
  C scale, bias, lr;
  FoldedMlp<C> mlp;
  bool weights;  // theta_K is wanted
};

template <class C>
struct SibForward {
  SibProblem<C> problem;
  C* logits;   // [T][Q][N]
  C* weights;  // [T][N][D] or null
  C* stats;    // [T][K][2][2][H] or null
  C* trace;    // [T][trace_size] or null
};

// Sums over a chunk of tasks.
template <class C>
struct SibParameterGrad {
  FoldedMlpGrad<C> mlp;
  C *scale, *bias;  // [1]
  C* weight;        // [D]

  __forceinline__ SibParameterGrad(Arena<C>& arena, const Sizes& s)
      : mlp(arena, s), scale(arena.take(1)), bias(arena.take(1)), weight(arena.take(s.D)) {}
};

template <class C>
struct SibBackward {
  SibProblem<C> problem;
  const C* trace;         // [T][trace_size]
  const C* grad_logits;   // [T][Q][N]
  const C* grad_weights;  // [T][N][D] or null
  C* grad_query;          // [T][Q][D] or null
  C* grad_start;          // [T][S or N][D] or null
};

template <class C>
struct MlpProblem {
  Sizes s;  // T, Q, N, H
  FoldedMlp<C> mlp;
  const C* logits;  // [T][Q][N]
};

template <class C>
struct ClassMeansProblem {
  Sizes s;  // T, S, N, D
  Features support;
  ClassTable classes;
  const C* weight;  // [D] or null
};

template <class C>
struct Kernels {
  // Elements that a task's trace takes.
  int64_t (*trace_size)(const Sizes&, bool weights);
  void (*sib_forward)(const SibForward<C>&, int64_t begin, int64_t end);
  // Adds to `grad`, which is zero at the start of a chunk.
  void (*sib_backward)(const SibBackward<C>&, const SibParameterGrad<C>& grad, int64_t begin, int64_t end);
  void (*mlp_forward)(const MlpProblem<C>&, C* out, int64_t begin, int64_t end);
  void (*mlp_backward)(const MlpProblem<C>&, const C* grad_out, C* grad_logits, const FoldedMlpGrad<C>& grad,
                       int64_t begin, int64_t end);
  void (*class_means_forward)(const ClassMeansProblem<C>&, C* theta0, int64_t begin, int64_t end);
  // grad_support [T][S][D] or null; adds to grad_weight [D] or null.
  void (*class_means_backward)(const ClassMeansProblem<C>&, const C* grad_theta0, C* grad_support,
                               C* grad_weight, int64_t begin, int64_t end);
};

}  // namespace kernelmeta

#include "cpu/ridge_table.h"

namespace kernelmeta {

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  ProgramKernels<float> program_f32;
  ProgramKernels<double> program_f64;
  RidgeKernels<float> ridge_f32;
  RidgeKernels<double> ridge_f64;
};

// The table for this machine, or for the instruction set that KERNELMETA_ISA names; throws
// std::invalid_argument where that one can't run here.
const KernelTable& kernel_table();

// Memory of the calling thread that stays allocated between calls, aligned to 64 bytes.
void* scratch(int64_t bytes);

}  // namespace kernelmeta
