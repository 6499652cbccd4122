// Launchers of the CUDA kernels. Each kernel is planned first: how many blocks, how much shared memory, how
// much workspace in global memory, which the caller allocates; nothing here allocates or waits. No CUDA
// headers.
#pragma once

#include <vector>

#include "cuda/program_call.h"
#include "engine/focal_distillation.h"
#include "engine/linear_head_task.h"
#include "engine/linearised_descent.h"
#include "engine/mlp_task.h"
#include "engine/ntk_gram.h"
#include "engine/problem.h"
#include "engine/ridge_task.h"
#include "engine/sum_parts.h"

namespace kernelmeta::cuda {

struct Plan {
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
  int64_t capacity = 0;   // elements of shared memory that the kernel lays out
  int64_t workspace = 0;  // elements of global memory for each block
};

// On the device and the stream (a cudaStream_t) of the launch.
struct Stream {
  int device;
  void* handle;
};

template <class C>
Plan plan_sib_forward(const SibForward<C>& f, int device);
// workspace [blocks][plan.workspace]; stride: trace_size
template <class C>
void launch_sib_forward(const SibForward<C>& f, const Plan& plan, C* workspace, const Stream& stream);

template <class C>
Plan plan_sib_backward(const SibBackward<C>& f, int device);
// partials [blocks][SibParameterGrad]
template <class C>
void launch_sib_backward(const SibBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                         const Stream& stream);

template <class C>
Plan plan_mlp(const MlpProblem<C>& p, bool backward, int device);
template <class C>
void launch_mlp_forward(const MlpProblem<C>& p, C* out, const Plan& plan, C* workspace, const Stream& stream);
// partials [blocks][FoldedMlpGrad]
template <class C>
void launch_mlp_backward(const MlpProblem<C>& p, const C* grad_out, C* grad_logits, const Plan& plan,
                         C* workspace, C* partials, const Stream& stream);

template <class C>
Plan plan_class_means(const ClassMeansProblem<C>& p, bool backward, int device);
template <class C>
void launch_class_means_forward(const ClassMeansProblem<C>& p, C* theta0, const Plan& plan, C* workspace,
                                const Stream& stream);
// grad_support: null where not wanted; partials [blocks][D]
template <class C>
void launch_class_means_backward(const ClassMeansProblem<C>& p, const C* grad_theta0, C* grad_support,
                                 const Plan& plan, C* workspace, C* partials, const Stream& stream);

template <class C>
Plan plan_linear_head_forward(const HeadForward<C>& f, int device);
template <class C>
void launch_linear_head_forward(const HeadForward<C>& f, const Plan& plan, C* workspace,
                                const Stream& stream);

template <class C>
Plan plan_linear_head_backward(const HeadBackward<C>& f, int device);
// partials [blocks][HeadParameterGrad]
template <class C>
void launch_linear_head_backward(const HeadBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                                 const Stream& stream);

// Plans of kernels whose tasks may differ: `tasks` has one of each size, or, where sizes are unknown, one
// that is as large as any; what the plan looks at besides, it looks at on the host.
template <class C>
Plan plan_program_forward(const ProgramForward<C>& f, const ProgramDeviceCall<C>& call,
                          const std::vector<int64_t>& tasks, int device);
template <class C>
void launch_program_forward(const ProgramForward<C>& f, const ProgramDeviceCall<C>& call, const Plan& plan,
                            C* workspace, const Stream& stream);

template <class C>
Plan plan_program_backward(const ProgramBackward<C>& f, const ProgramDeviceCall<C>& call,
                           const std::vector<int64_t>& tasks, int device);
// partials [blocks][ProgramGrad]
template <class C>
void launch_program_backward(const ProgramBackward<C>& f, const ProgramDeviceCall<C>& call, const Plan& plan,
                             C* workspace, C* partials, const Stream& stream);

// stride: from one task's trace to the next one's
template <class C>
Plan plan_ridge_forward(const RidgeForward<C>& f, int64_t stride, const std::vector<int64_t>& tasks,
                        int device);
template <class C>
void launch_ridge_forward(const RidgeForward<C>& f, int64_t stride, const Plan& plan, C* workspace,
                          const Stream& stream);

template <class C>
Plan plan_ridge_backward(const RidgeBackward<C>& f, int64_t stride, const std::vector<int64_t>& tasks,
                         int device);
// partials [blocks][RidgeGrad]
template <class C>
void launch_ridge_backward(const RidgeBackward<C>& f, int64_t stride, const Plan& plan, C* workspace,
                           C* partials, const Stream& stream);

template <class C>
Plan plan_focal_distillation(const DistillationProblem<C>& p, bool backward, int device);
template <class C>
void launch_focal_distillation_forward(const DistillationForward<C>& f, const Plan& plan, C* workspace,
                                       const Stream& stream);
template <class C>
void launch_focal_distillation_backward(const DistillationBackward<C>& f, const Plan& plan, C* workspace,
                                        const Stream& stream);

template <class C>
Plan plan_linearised_descent_forward(const DescentForward<C>& f, int device);
template <class C>
void launch_linearised_descent_forward(const DescentForward<C>& f, const Plan& plan, C* workspace,
                                       const Stream& stream);

template <class C>
Plan plan_linearised_descent_backward(const DescentBackward<C>& f, int device);
// partials [blocks][DescentGrad]
template <class C>
void launch_linearised_descent_backward(const DescentBackward<C>& f, const Plan& plan, C* workspace,
                                        C* partials, const Stream& stream);

template <class C>
Plan plan_ntk_gram_forward(const NtkForward<C>& f, int device);
template <class C>
void launch_ntk_gram_forward(const NtkForward<C>& f, const Plan& plan, C* workspace, const Stream& stream);

template <class C>
Plan plan_ntk_gram_backward(const NtkBackward<C>& f, int device);
// partials [blocks][NtkGrad]
template <class C>
void launch_ntk_gram_backward(const NtkBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                              const Stream& stream);

// to = factor * the sum of partials[b][..size] over b < count, in order.
template <class C>
void launch_sum_partials(const C* partials, int64_t count, int64_t size, C factor, const SumParts<C>& to,
                         const Stream& stream);

// sums: a FoldedMlpGrad.
template <class C>
void launch_unfold(const Sizes& s, const MlpArrays<const C>& mlp, C* sums, const MlpArrays<C>& to,
                   const Stream& stream);

}  // namespace kernelmeta::cuda
