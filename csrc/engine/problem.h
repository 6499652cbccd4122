// What the ops are asked to compute: plain structs of pointers; whoever fills them in has checked every
// shape. All offsets are in elements.
#pragma once

#include "engine/features.h"
#include "engine/fold.h"

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
  int64_t bank;  // rows that an index may point to
};

// The support rows' classes: as labels, or sorted already; see ClassMembers. All null where theta0 is given
// instead of support rows.
struct ClassTable {
  const int64_t* labels;   // [T][S], not checked yet
  const int32_t* members;  // [T][S]
  const int32_t* offsets;  // [T][N + 1]

  KERNELMETA_INLINE bool given() const { return labels || members; }
};

template <class C>
struct MlpProblem {
  Sizes s;  // T, Q, N, H
  MlpArrays<const C> mlp;
  const C* running;  // [2][2][H] or null
  const C* logits;   // [T][Q][N]
};

template <class C>
struct ClassMeansProblem {
  Sizes s;  // T, S, N, D
  Features support;
  ClassTable classes;
  const C* weight;  // [D] or null
};

template <class C>
struct SibProblem {
  Sizes s;
  Features query;
  Features start;  // support rows, or theta0 [T][N][D]
  ClassTable classes;
  const C* weight;  // [D] or null
  const C *scale, *bias;
  C lr;
  MlpArrays<const C> mlp;
  const C* running;  // [2][2][H] or null
  bool weights;      // theta_K is wanted
};

template <class C>
struct SibForward {
  SibProblem<C> problem;
  C* logits;   // [T][Q][N]
  C* weights;  // [T][N][D] or null
  C* stats;    // [T][K][2][2][H] or null
  C* trace;    // [T][trace_size] or null
};

// Sums over tasks.
template <class C>
struct SibParameterGrad {
  FoldedMlpGrad<C> mlp;
  C *scale, *bias;  // [1]
  C* weight;        // [D]

  template <class S>
  KERNELMETA_INLINE SibParameterGrad(Arena<C>& arena, const S& s)
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

// Elements of a Layout, a struct that takes its arrays from an Arena.
template <class Layout, class C, class... Args>
__host__ __forceinline__ int64_t size_of(const Args&... args) {
  Arena<C> count;
  Layout unused(count, args...);
  return count.used();
}

// Elements that a task's trace takes.
template <class C>
__host__ __forceinline__ int64_t trace_size(const Sizes& s, bool weights) {
  Arena<C> count;
  Trace<C> unused(count, count, s, forms_gram(s, true), weights);
  return count.used();
}

}  // namespace kernelmeta
