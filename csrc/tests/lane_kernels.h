// The CUDA kernels, planned and launched as on a GPU and executed lane by lane (lanes/machine.h), as a table
// of kernels.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernel_table.h"
#include "cuda/launch.h"
#include "lanes/machine.h"
#include "tests/learner_checks.h"
#include "tests/part_checks.h"

namespace kernelmeta {
namespace {

const cuda::Stream lane_stream{0, nullptr};

// Memory of a call, full of NaN, aligned as a GPU's.
template <class C>
class LaneMemory {
 public:
  explicit LaneMemory(int64_t elements) : packs_(size_t(padded(elements)) / Pack::kSize) {
    for (Pack& pack : packs_) {
      for (C& x : pack.v) x = C(NAN);
    }
  }
  operator C*() { return packs_.empty() ? nullptr : packs_[0].v; }

 private:
  struct alignas(16) Pack {
    static constexpr int kSize = 16 / int(sizeof(C));
    C v[kSize];
  };
  std::vector<Pack> packs_;
};

// launch(workspace), counted under this name.
template <class C, class Launch>
void on_lanes(const char* name, const cuda::Plan& plan, Launch launch) {
  lanes::count_as(name);
  LaneMemory<C> workspace(plan.blocks * plan.workspace);
  launch(static_cast<C*>(workspace));
}

// launch(workspace, partials), whose sums of `size` elements are added to `to`.
template <class C, class Launch>
void sums_on_lanes(const char* name, const cuda::Plan& plan, int64_t size, C* to, Launch launch) {
  LaneMemory<C> partials(plan.blocks * size), sums(size);
  on_lanes<C>(name, plan, [&](C* workspace) { launch(workspace, static_cast<C*>(partials)); });
  C* const found = sums;
  lanes::count_as("sum_partials");
  cuda::launch_sum_partials<C>(partials, plan.blocks, size, C(1), SumParts<C>(found, size), lane_stream);
  for (int64_t i = 0; i < size; ++i) to[i] += found[i];
}

template <class C>
void lane_sib_forward(const SibForward<C>& f, const FoldedMlp<C>&, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_sib_forward(f, 0);
  on_lanes<C>("sib", plan,
              [&](C* workspace) { cuda::launch_sib_forward<C>(f, plan, workspace, lane_stream); });
}

template <class C>
void lane_sib_backward(const SibBackward<C>& f, const FoldedMlp<C>&, const SibParameterGrad<C>& grad, int64_t,
                       int64_t) {
  const cuda::Plan plan = cuda::plan_sib_backward(f, 0);
  sums_on_lanes<C>("sib_backward", plan, size_of<SibParameterGrad<C>, C>(f.problem.s), grad.mlp.w1t,
                   [&](C* workspace, C* partials) {
                     cuda::launch_sib_backward<C>(f, plan, workspace, partials, lane_stream);
                   });
}

template <class C>
void lane_mlp_forward(const MlpProblem<C>& p, const FoldedMlp<C>&, C* out, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_mlp(p, false, 0);
  on_lanes<C>("synthetic_gradient_mlp", plan,
              [&](C* workspace) { cuda::launch_mlp_forward<C>(p, out, plan, workspace, lane_stream); });
}

template <class C>
void lane_mlp_backward(const MlpProblem<C>& p, const FoldedMlp<C>&, const C* grad_out, C* grad_logits,
                       const FoldedMlpGrad<C>& grad, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_mlp(p, true, 0);
  sums_on_lanes<C>("synthetic_gradient_mlp_backward", plan, size_of<FoldedMlpGrad<C>, C>(p.s), grad.w1t,
                   [&](C* workspace, C* partials) {
                     cuda::launch_mlp_backward<C>(p, grad_out, grad_logits, plan, workspace, partials,
                                                  lane_stream);
                   });
}

template <class C>
void lane_class_means_forward(const ClassMeansProblem<C>& p, C* theta0, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_class_means(p, false, 0);
  on_lanes<C>("class_means", plan, [&](C* workspace) {
    cuda::launch_class_means_forward<C>(p, theta0, plan, workspace, lane_stream);
  });
}

template <class C>
void lane_class_means_backward(const ClassMeansProblem<C>& p, const C* grad_theta0, C* grad_support,
                               C* grad_weight, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_class_means(p, true, 0);
  if (!grad_weight) {
    on_lanes<C>("class_means_backward", plan, [&](C* workspace) {
      cuda::launch_class_means_backward<C>(p, grad_theta0, grad_support, plan, workspace, nullptr,
                                           lane_stream);
    });
    return;
  }
  sums_on_lanes<C>("class_means_backward", plan, p.s.D, grad_weight, [&](C* workspace, C* partials) {
    cuda::launch_class_means_backward<C>(p, grad_theta0, grad_support, plan, workspace, partials,
                                         lane_stream);
  });
}

template <class C>
void lane_linear_head_forward(const HeadForward<C>& f, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_linear_head_forward(f, 0);
  on_lanes<C>("linear_head", plan,
              [&](C* workspace) { cuda::launch_linear_head_forward<C>(f, plan, workspace, lane_stream); });
}

template <class C>
void lane_linear_head_backward(const HeadBackward<C>& f, const HeadParameterGrad<C>& grad, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_linear_head_backward(f, 0);
  sums_on_lanes<C>("linear_head_backward", plan, size_of<HeadParameterGrad<C>, C>(f.problem.s), grad.weight,
                   [&](C* workspace, C* partials) {
                     cuda::launch_linear_head_backward<C>(f, plan, workspace, partials, lane_stream);
                   });
}

// plan(run, tasks) of kernels whose tasks may differ: with sizes that the host knows, or with the largest
// there may be.
template <class Run, class Make>
cuda::Plan plan_of_tasks(const Run& run, Make plan) {
  Run known = run;
  auto& p = known.problem;
  const int64_t support[] = {0, p.support.most}, query[] = {0, p.query.most}, ways = p.N;
  std::vector<int64_t> tasks{0};
  if (p.support.most >= 0) {
    p.support.offsets = support;
    p.query.offsets = query;
    p.classes.ways = &ways;
  } else {
    for (int64_t t = 1; t < p.T; ++t) tasks.push_back(t);
  }
  return plan(known, tasks);
}

template <class C>
ProgramDeviceCall<C> lane_call(const ProgramProblem<C>& p, const KernelCall<C>& call) {
  ProgramDeviceCall<C> own{};
  std::copy(call.phases, call.phases + p.n_phases, own.phases);
  own.sizes = p.mlp_sizes();
  own.mlp = RawMlp<C>::arrays;
  own.running = RawMlp<C>::running;
  own.stride = call.trace_offsets[1];
  return own;
}

template <class C>
void lane_program_forward(const ProgramForward<C>& f, const KernelCall<C>& call, int64_t, int64_t) {
  const ProgramDeviceCall<C> own = lane_call(f.problem, call);
  const cuda::Plan plan = plan_of_tasks(f, [&](const auto& known, const auto& tasks) {
    return cuda::plan_program_forward<C>(known, own, tasks, 0);
  });
  on_lanes<C>("program", plan,
              [&](C* workspace) { cuda::launch_program_forward<C>(f, own, plan, workspace, lane_stream); });
}

template <class C>
void lane_program_backward(const ProgramBackward<C>& f, const KernelCall<C>& call, const ProgramGrad<C>& grad,
                           int64_t, int64_t) {
  const ProgramDeviceCall<C> own = lane_call(f.problem, call);
  const cuda::Plan plan = plan_of_tasks(f, [&](const auto& known, const auto& tasks) {
    return cuda::plan_program_backward<C>(known, own, tasks, 0);
  });
  sums_on_lanes<C>("program_backward", plan, size_of<ProgramGrad<C>, C>(f.problem), grad.theta0,
                   [&](C* workspace, C* partials) {
                     cuda::launch_program_backward<C>(f, own, plan, workspace, partials, lane_stream);
                   });
}

template <class C>
void lane_ridge_forward(const RidgeForward<C>& f, const int64_t* trace_offsets, bool*, int64_t, int64_t) {
  const int64_t stride = trace_offsets[1];
  const cuda::Plan plan = plan_of_tasks(f, [&](const auto& known, const auto& tasks) {
    return cuda::plan_ridge_forward<C>(known, stride, tasks, 0);
  });
  on_lanes<C>("ridge", plan,
              [&](C* workspace) { cuda::launch_ridge_forward<C>(f, stride, plan, workspace, lane_stream); });
}

template <class C>
void lane_ridge_backward(const RidgeBackward<C>& f, const int64_t* trace_offsets, const RidgeGrad<C>& grad,
                         int64_t, int64_t) {
  const int64_t stride = trace_offsets[1];
  const cuda::Plan plan = plan_of_tasks(f, [&](const auto& known, const auto& tasks) {
    return cuda::plan_ridge_backward<C>(known, stride, tasks, 0);
  });
  sums_on_lanes<C>("ridge_backward", plan, size_of<RidgeGrad<C>, C>(), grad.lambda,
                   [&](C* workspace, C* partials) {
                     cuda::launch_ridge_backward<C>(f, stride, plan, workspace, partials, lane_stream);
                   });
}

template <class C>
void lane_focal_distillation_forward(const DistillationForward<C>& f, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_focal_distillation(f.problem, false, 0);
  on_lanes<C>("focal_distillation", plan, [&](C* workspace) {
    cuda::launch_focal_distillation_forward<C>(f, plan, workspace, lane_stream);
  });
}

template <class C>
void lane_focal_distillation_backward(const DistillationBackward<C>& f, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_focal_distillation(f.problem, true, 0);
  on_lanes<C>("focal_distillation_backward", plan, [&](C* workspace) {
    cuda::launch_focal_distillation_backward<C>(f, plan, workspace, lane_stream);
  });
}

template <class C>
void lane_descent_forward(const DescentForward<C>& f, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_linearised_descent_forward(f, 0);
  on_lanes<C>("linearised_descent", plan, [&](C* workspace) {
    cuda::launch_linearised_descent_forward<C>(f, plan, workspace, lane_stream);
  });
}

template <class C>
void lane_descent_backward(const DescentBackward<C>& f, const DescentGrad<C>& grad, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_linearised_descent_backward(f, 0);
  sums_on_lanes<C>("linearised_descent_backward", plan, size_of<DescentGrad<C>, C>(f.problem.net),
                   grad.parameters, [&](C* workspace, C* partials) {
                     cuda::launch_linearised_descent_backward<C>(f, plan, workspace, partials, lane_stream);
                   });
}

template <class C>
void lane_ntk_forward(const NtkForward<C>& f, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_ntk_gram_forward(f, 0);
  on_lanes<C>("ntk_gram", plan,
              [&](C* workspace) { cuda::launch_ntk_gram_forward<C>(f, plan, workspace, lane_stream); });
}

template <class C>
void lane_ntk_backward(const NtkBackward<C>& f, const NtkGrad<C>& grad, int64_t, int64_t) {
  const cuda::Plan plan = cuda::plan_ntk_gram_backward(f, 0);
  sums_on_lanes<C>("ntk_gram_backward", plan, size_of<NtkGrad<C>, C>(f.problem.net), grad.parameters,
                   [&](C* workspace, C* partials) {
                     cuda::launch_ntk_gram_backward<C>(f, plan, workspace, partials, lane_stream);
                   });
}

template <class C>
constexpr Kernels<C> kLaneKernels = {.sib_forward = lane_sib_forward<C>,
                                     .sib_backward = lane_sib_backward<C>,
                                     .sib_training = nullptr,  // on a CPU alone
                                     .mlp_forward = lane_mlp_forward<C>,
                                     .mlp_backward = lane_mlp_backward<C>,
                                     .class_means_forward = lane_class_means_forward<C>,
                                     .class_means_backward = lane_class_means_backward<C>,
                                     .linear_head_forward = lane_linear_head_forward<C>,
                                     .linear_head_backward = lane_linear_head_backward<C>,
                                     .linear_head_training = nullptr,
                                     .program_forward = lane_program_forward<C>,
                                     .program_backward = lane_program_backward<C>,
                                     .ridge_forward = lane_ridge_forward<C>,
                                     .ridge_backward = lane_ridge_backward<C>,
                                     .focal_distillation_forward = lane_focal_distillation_forward<C>,
                                     .focal_distillation_backward = lane_focal_distillation_backward<C>,
                                     .linearised_descent_forward = lane_descent_forward<C>,
                                     .linearised_descent_backward = lane_descent_backward<C>,
                                     .ntk_gram_forward = lane_ntk_forward<C>,
                                     .ntk_gram_backward = lane_ntk_backward<C>};

const KernelTable kLaneTable = {"lanes", kLaneKernels<float>, kLaneKernels<double>};

}  // namespace
}  // namespace kernelmeta
