// What a build for one instruction set offers: functions over a range of tasks, for float and for double.
#pragma once

#include "engine/linear_head_task.h"
#include "engine/problem.h"

namespace kernelmeta {

// An op and its backward in one pass over the tasks, for a loss known beforehand: the mean cross entropy.
template <class C, class Forward, class Grad>
struct Training {
  Forward forward;        // without a trace
  const int64_t* labels;  // [T][Q], of the query rows
  C share;                // of one row in the mean

  // Sums over a chunk of tasks.
  struct Sums {
    Grad grad;
    C* measures;  // [2]; see QueryLoss

    __forceinline__ Sums(Arena<C>& arena, const Sizes& s) : grad(arena, s), measures(arena.take(2)) {}
  };
};
template <class C>
using SibTraining = Training<C, SibForward<C>, SibParameterGrad<C>>;
template <class C>
using HeadTraining = Training<C, HeadForward<C>, HeadParameterGrad<C>>;

template <class C>
struct Kernels {
  void (*sib_forward)(const SibForward<C>&, const FoldedMlp<C>& mlp, int64_t begin, int64_t end);
  // Adds to `grad`, which is zero at the start of a chunk.
  void (*sib_backward)(const SibBackward<C>&, const FoldedMlp<C>& mlp, const SibParameterGrad<C>& grad,
                       int64_t begin, int64_t end);
  void (*sib_training)(const SibTraining<C>&, const FoldedMlp<C>& mlp,
                       const typename SibTraining<C>::Sums& sums, int64_t begin, int64_t end);
  void (*mlp_forward)(const MlpProblem<C>&, const FoldedMlp<C>& mlp, C* out, int64_t begin, int64_t end);
  void (*mlp_backward)(const MlpProblem<C>&, const FoldedMlp<C>& mlp, const C* grad_out, C* grad_logits,
                       const FoldedMlpGrad<C>& grad, int64_t begin, int64_t end);
  void (*class_means_forward)(const ClassMeansProblem<C>&, C* theta0, int64_t begin, int64_t end);
  // grad_support [T][S][D] or null; adds to grad_weight [D] or null.
  void (*class_means_backward)(const ClassMeansProblem<C>&, const C* grad_theta0, C* grad_support,
                               C* grad_weight, int64_t begin, int64_t end);
  void (*linear_head_forward)(const HeadForward<C>&, int64_t begin, int64_t end);
  void (*linear_head_backward)(const HeadBackward<C>&, const HeadParameterGrad<C>& grad, int64_t begin,
                               int64_t end);
  void (*linear_head_training)(const HeadTraining<C>&, const typename HeadTraining<C>::Sums& sums,
                               int64_t begin, int64_t end);
};

}  // namespace kernelmeta

#include "cpu/program_table.h"
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
