// What a build for one instruction set offers: functions over a range of tasks, for float and for double.
#pragma once

#include "engine/focal_distillation.h"
#include "engine/linearised_descent.h"
#include "engine/ntk_gram.h"
#include "engine/program_task.h"
#include "engine/ridge_task.h"
#include "engine/training.h"

namespace kernelmeta {

// What a program's kernels take that is made ready once a call.
template <class C>
struct KernelCall {
  const Phase* phases;
  FoldedMlp<C> mlp;
  const int64_t* trace_offsets;  // [T + 1], in elements
};

// Those that return sums over tasks add to them; they are zero at the start of a chunk.
template <class C>
struct Kernels {
  void (*sib_forward)(const SibForward<C>&, const FoldedMlp<C>& mlp, int64_t begin, int64_t end);
  void (*sib_backward)(const SibBackward<C>&, const FoldedMlp<C>& mlp, const SibParameterGrad<C>& grad,
                       int64_t begin, int64_t end);
  void (*sib_training)(const SibTraining<C>&, const FoldedMlp<C>& mlp,
                       const typename SibTraining<C>::Sums& sums, int64_t begin, int64_t end);
  void (*mlp_forward)(const MlpProblem<C>&, const FoldedMlp<C>& mlp, C* out, int64_t begin, int64_t end);
  void (*mlp_backward)(const MlpProblem<C>&, const FoldedMlp<C>& mlp, const C* grad_out, C* grad_logits,
                       const FoldedMlpGrad<C>& grad, int64_t begin, int64_t end);
  void (*class_means_forward)(const ClassMeansProblem<C>&, C* theta0, int64_t begin, int64_t end);
  // grad_support [T][S][D] or null; grad_weight [D] or null.
  void (*class_means_backward)(const ClassMeansProblem<C>&, const C* grad_theta0, C* grad_support,
                               C* grad_weight, int64_t begin, int64_t end);
  void (*linear_head_forward)(const HeadForward<C>&, int64_t begin, int64_t end);
  void (*linear_head_backward)(const HeadBackward<C>&, const HeadParameterGrad<C>& grad, int64_t begin,
                               int64_t end);
  void (*linear_head_training)(const HeadTraining<C>&, const typename HeadTraining<C>::Sums& sums,
                               int64_t begin, int64_t end);
  void (*program_forward)(const ProgramForward<C>&, const KernelCall<C>&, int64_t begin, int64_t end);
  void (*program_backward)(const ProgramBackward<C>&, const KernelCall<C>&, const ProgramGrad<C>& grad,
                           int64_t begin, int64_t end);
  // trace_offsets: [T + 1], in elements; singular: [T]
  void (*ridge_forward)(const RidgeForward<C>&, const int64_t* trace_offsets, bool* singular, int64_t begin,
                        int64_t end);
  void (*ridge_backward)(const RidgeBackward<C>&, const int64_t* trace_offsets, const RidgeGrad<C>& grad,
                         int64_t begin, int64_t end);
  // A range of rows.
  void (*focal_distillation_forward)(const DistillationForward<C>&, int64_t begin, int64_t end);
  void (*focal_distillation_backward)(const DistillationBackward<C>&, int64_t begin, int64_t end);
  void (*linearised_descent_forward)(const DescentForward<C>&, int64_t begin, int64_t end);
  void (*linearised_descent_backward)(const DescentBackward<C>&, const DescentGrad<C>& grad, int64_t begin,
                                      int64_t end);
  void (*ntk_gram_forward)(const NtkForward<C>&, int64_t begin, int64_t end);
  void (*ntk_gram_backward)(const NtkBackward<C>&, const NtkGrad<C>& grad, int64_t begin, int64_t end);
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;

  template <class C>
  const Kernels<C>& of() const {
    if constexpr (sizeof(C) == 4)
      return f32;
    else
      return f64;
  }
};

// The table for this machine, or for the instruction set that KERNELMETA_ISA names; throws
// std::invalid_argument where that one can't run here.
const KernelTable& kernel_table();

// Memory of the calling thread that stays allocated between calls, aligned to 64 bytes.
void* scratch(int64_t bytes);

}  // namespace kernelmeta
