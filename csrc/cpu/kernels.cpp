// The kernels for one instruction set. This file is compiled once for each (see CMakeLists.txt), with
// KERNELMETA_ISA naming it; everything but the table is local to the file, so that no function compiled for
// one instruction set is ever linked in the place of another's.
#include "cpu/block.h"
#include "cpu/kernel_table.h"
#include "engine/mlp_task.h"
#include "engine/query_loss.h"
#include "engine/sib_task.h"

#define KERNELMETA_STRING_(x) #x
#define KERNELMETA_STRING(x) KERNELMETA_STRING_(x)
#define KERNELMETA_JOIN_(a, b) a##b
#define KERNELMETA_JOIN(a, b) KERNELMETA_JOIN_(a, b)

namespace {

using namespace kernelmeta;

// Lays a workspace out twice: to count its size, then in this thread's scratch memory.
template <class Workspace, class C, class... Args>
Workspace in_scratch(const Args&... args) {
  const int64_t size = size_of<Workspace, C>(args...);
  C* memory = static_cast<C*>(scratch(size * int64_t(sizeof(C))));
  Arena<C> arena(memory);
  return Workspace(arena, args...);
}

template <class C>
struct SibForwardWorkspace {
  CpuBlock<C> block;
  Arena<C> nowhere;  // the trace is the caller's
  SibTask<CpuBlock<C>> task;
  Trace<C> trace;
  SibForwardWorkspace(Arena<C>& arena, const SibProblem<C>& p, const FoldedMlp<C>& mlp, bool gram_formed,
                      bool keeps_trace)
      : task(arena, block, p.s, p, mlp, *p.scale, *p.bias, gram_formed, false),
        trace(keeps_trace ? nowhere : arena, keeps_trace ? nowhere : arena, p.s, gram_formed, p.weights) {}
};

template <class C>
void sib_forward(const SibForward<C>& f, const FoldedMlp<C>& mlp, int64_t begin, int64_t end) {
  const Sizes& s = f.problem.s;
  const bool gram_formed = forms_gram(s, f.trace != nullptr);
  auto w = in_scratch<SibForwardWorkspace<C>, C>(f.problem, mlp, gram_formed, f.trace != nullptr);
  const int64_t stride = trace_size<C>(s, f.problem.weights);
  for (int64_t t = begin; t < end; ++t) {
    if (f.trace) {
      Arena<C> arena(f.trace + t * stride);
      const Trace<C> trace(arena, arena, s, gram_formed, f.problem.weights);
      trace.clear_padding(w.block, s);
      w.task.forward(f, t, trace);
    } else {
      w.task.forward(f, t, w.trace);
    }
  }
}

template <class C, bool kKeeps = false>
struct SibBackwardWorkspace {
  using Task = SibTask<CpuBlock<C>, kKeeps>;
  CpuBlock<C> block;
  Task task;
  typename Task::Adjoint adjoint;
  C* gtheta0;

  SibBackwardWorkspace(Arena<C>& arena, const SibProblem<C>& p, const FoldedMlp<C>& mlp, bool gram_formed,
                       bool query_grad, bool weights)
      : task(arena, block, p.s, p, mlp, *p.scale, *p.bias, gram_formed, true),
        adjoint(arena, p.s, gram_formed, query_grad, weights),
        gtheta0(arena.take(p.s.N * p.s.D)) {
    if (kKeeps) adjoint.loop.gs = task.loop.g;
  }
};

template <class C>
void sib_backward(const SibBackward<C>& f, const FoldedMlp<C>& mlp, const SibParameterGrad<C>& grad,
                  int64_t begin, int64_t end) {
  const Sizes& s = f.problem.s;
  const bool gram_formed = forms_gram(s, true);
  auto w = in_scratch<SibBackwardWorkspace<C>, C>(f.problem, mlp, gram_formed, f.grad_query != nullptr,
                                                  f.grad_weights != nullptr);
  const int64_t stride = trace_size<C>(s, f.problem.weights);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(const_cast<C*>(f.trace) + t * stride);
    const Trace<C> trace(arena, arena, s, gram_formed, f.problem.weights);
    w.task.backward(f, t, trace, w.adjoint, grad, w.gtheta0);
  }
}

template <class C, bool kKeeps>
struct SibTrainingWorkspace {
  CpuBlock<C> block;
  QueryLoss<CpuBlock<C>> loss;
  Trace<C> trace;
  SibBackwardWorkspace<C, kKeeps> backward;
  C* grad_logits;

  SibTrainingWorkspace(Arena<C>& arena, const SibProblem<C>& p, const FoldedMlp<C>& mlp, bool gram_formed)
      : loss(arena, block, p.s),
        trace(arena, arena, p.s, gram_formed, false),
        backward(arena, p, mlp, gram_formed, false, false),
        grad_logits(arena.take(p.s.Q * p.s.N)) {}
};

template <bool kKeeps, class C>
void sib_training(const SibTraining<C>& f, const FoldedMlp<C>& mlp, const typename SibTraining<C>::Sums& sums,
                  int64_t begin, int64_t end) {
  const SibProblem<C>& p = f.forward.problem;
  const Sizes& s = p.s;
  auto w = in_scratch<SibTrainingWorkspace<C, kKeeps>, C>(p, mlp, forms_gram(s, true));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t logits = t * s.Q * s.N;
    w.backward.task.forward(f.forward, t, w.trace);
    w.loss(f.forward.logits + logits, f.labels + t * s.Q, f.share, w.grad_logits, sums.measures);
    const SibBackward<C> back{p, nullptr, w.grad_logits - logits, nullptr, nullptr, nullptr};
    w.backward.task.backward(back, t, w.trace, w.backward.adjoint, sums.grad, w.backward.gtheta0);
  }
}

// Activations are kept as long as they stay in a core's share of the caches.
inline constexpr int64_t kKeptBytes = 4 << 20;

template <class C>
void sib_training(const SibTraining<C>& f, const FoldedMlp<C>& mlp, const typename SibTraining<C>::Sums& sums,
                  int64_t begin, int64_t end) {
  const Sizes& s = f.forward.problem.s;
  const int64_t bytes = s.K * InnerLoop<CpuBlock<C>, true>::kept_size(s) * int64_t(sizeof(C));
  if (bytes <= kKeptBytes)
    sib_training<true>(f, mlp, sums, begin, end);
  else
    sib_training<false>(f, mlp, sums, begin, end);
}

template <class C>
struct MlpWorkspace {
  CpuBlock<C> block;
  MlpTask<CpuBlock<C>> task;
  MlpWorkspace(Arena<C>& arena, const Sizes& s, const FoldedMlp<C>& mlp, bool backward)
      : task(arena, block, s, mlp, backward) {}
};

template <class C>
void mlp_forward(const MlpProblem<C>& p, const FoldedMlp<C>& mlp, C* out, int64_t begin, int64_t end) {
  auto w = in_scratch<MlpWorkspace<C>, C>(p.s, mlp, false);
  const int64_t task = p.s.Q * p.s.N;
  for (int64_t t = begin; t < end; ++t) w.task.forward(p.logits + t * task, out + t * task);
}

template <class C>
void mlp_backward(const MlpProblem<C>& p, const FoldedMlp<C>& mlp, const C* grad_out, C* grad_logits,
                  const FoldedMlpGrad<C>& grad, int64_t begin, int64_t end) {
  auto w = in_scratch<MlpWorkspace<C>, C>(p.s, mlp, true);
  const int64_t task = p.s.Q * p.s.N;
  for (int64_t t = begin; t < end; ++t) {
    w.task.backward(p.logits + t * task, grad_out + t * task, grad_logits + t * task, grad);
  }
}

template <class C>
struct ClassMeansWorkspace {
  CpuBlock<C> block;
  C *buffer, *inverse;
  ClassMeansWorkspace(Arena<C>& arena, const ClassMeansProblem<C>& p)
      : buffer(widened_rows(arena, p.support, p.s.D)), inverse(arena.take(p.s.S)) {}

  ClassMeans<CpuBlock<C>> task(const ClassMeansProblem<C>& p, int64_t t) {
    const ClassMembers classes{p.classes.members + t * p.s.S, p.classes.offsets + t * (p.s.N + 1)};
    return {block, p.s, widen(p.support, t, p.s.D, buffer), classes, p.weight, inverse};
  }
};

template <class C>
void class_means_forward(const ClassMeansProblem<C>& p, C* theta0, int64_t begin, int64_t end) {
  auto w = in_scratch<ClassMeansWorkspace<C>, C>(p);
  for (int64_t t = begin; t < end; ++t) w.task(p, t).forward(theta0 + t * p.s.N * p.s.D);
}

template <class C>
void class_means_backward(const ClassMeansProblem<C>& p, const C* grad_theta0, C* grad_support,
                          C* grad_weight, int64_t begin, int64_t end) {
  auto w = in_scratch<ClassMeansWorkspace<C>, C>(p);
  for (int64_t t = begin; t < end; ++t) {
    w.task(p, t).backward(grad_theta0 + t * p.s.N * p.s.D,
                          grad_support ? grad_support + t * p.s.S * p.s.D : nullptr, grad_weight);
  }
}

template <class C>
struct HeadForwardWorkspace {
  Arena<C> nowhere;  // the trace is the caller's
  CpuBlock<C> block;
  HeadTask<CpuBlock<C>> task;
  typename LinearHead<CpuBlock<C>>::Scratch scratch;
  HeadTrace<C> trace;
  HeadForwardWorkspace(Arena<C>& arena, const HeadProblem<C>& p, bool own_trace)
      : task(arena, block, p), scratch(arena, p.s), trace(own_trace ? arena : nowhere, p.s) {}
};

template <class C>
void linear_head_forward(const HeadForward<C>& f, int64_t begin, int64_t end) {
  const Sizes& s = f.problem.s;
  auto w = in_scratch<HeadForwardWorkspace<C>, C>(f.problem, f.trace == nullptr);
  const int64_t stride = head_trace_size<C>(s);
  for (int64_t t = begin; t < end; ++t) {
    if (f.trace) memset(f.trace + t * stride, 0, sizeof(C) * stride);
    Arena<C> arena(f.trace ? f.trace + t * stride : nullptr);
    LinearHead<CpuBlock<C>> head = w.task.head(t, f.trace ? HeadTrace<C>(arena, s) : w.trace);
    w.task.forward(head, f, t, w.scratch);
  }
}

template <class C>
struct HeadBackwardWorkspace {
  CpuBlock<C> block;
  HeadTask<CpuBlock<C>> task;
  typename LinearHead<CpuBlock<C>>::Adjoint adjoint;
  HeadBackwardWorkspace(Arena<C>& arena, const HeadProblem<C>& p, bool support_gradient)
      : task(arena, block, p), adjoint(arena, p.s, support_gradient) {}
};

template <class C>
void linear_head_backward(const HeadBackward<C>& f, const HeadParameterGrad<C>& grad, int64_t begin,
                          int64_t end) {
  const Sizes& s = f.problem.s;
  auto w =
      in_scratch<HeadBackwardWorkspace<C>, C>(f.problem, f.grad_support != nullptr && !f.problem.first_order);
  const int64_t stride = head_trace_size<C>(s);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(const_cast<C*>(f.trace) + t * stride);
    LinearHead<CpuBlock<C>> head = w.task.head(t, HeadTrace<C>(arena, s));
    w.task.backward(head, f, t, w.adjoint, grad);
  }
}

template <class C>
struct HeadTrainingWorkspace {
  CpuBlock<C> block;
  QueryLoss<CpuBlock<C>> loss;
  HeadForwardWorkspace<C> forward;
  typename LinearHead<CpuBlock<C>>::Adjoint adjoint;
  C* grad_logits;

  HeadTrainingWorkspace(Arena<C>& arena, const HeadProblem<C>& p)
      : loss(arena, block, p.s),
        forward(arena, p, true),
        adjoint(arena, p.s, false),
        grad_logits(arena.take(p.s.Q * p.s.N)) {}
};

template <class C>
void linear_head_training(const HeadTraining<C>& f, const typename HeadTraining<C>::Sums& sums, int64_t begin,
                          int64_t end) {
  const HeadProblem<C>& p = f.forward.problem;
  const Sizes& s = p.s;
  auto w = in_scratch<HeadTrainingWorkspace<C>, C>(p);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t logits = t * s.Q * s.N;
    LinearHead<CpuBlock<C>> head = w.forward.task.head(t, w.forward.trace);
    w.forward.task.forward(head, f.forward, t, w.forward.scratch);
    w.loss(f.forward.logits + logits, f.labels + t * s.Q, f.share, w.grad_logits, sums.measures);
    const HeadBackward<C> back{p, nullptr, w.grad_logits - logits, nullptr, nullptr, nullptr};
    w.forward.task.backward(head, back, t, w.adjoint, sums.grad);
  }
}

template <class C>
struct DistillationWorkspace {
  CpuBlock<C> block;
  DistillationRows<CpuBlock<C>> rows;
  DistillationWorkspace(Arena<C>& arena, const DistillationProblem<C>& p, bool backward)
      : rows(arena, block, p, 1, backward) {}
};

template <class C>
void focal_distillation_forward(const DistillationForward<C>& f, int64_t begin, int64_t end) {
  auto w = in_scratch<DistillationWorkspace<C>, C>(f.problem, false);
  for (int64_t r = begin; r < end; ++r) w.rows.forward(f, r, 1);
}

template <class C>
void focal_distillation_backward(const DistillationBackward<C>& f, int64_t begin, int64_t end) {
  auto w = in_scratch<DistillationWorkspace<C>, C>(f.problem, true);
  for (int64_t r = begin; r < end; ++r) w.rows.backward(f, r, 1);
}

}  // namespace

#include "cpu/ntk_kernels.h"
#include "cpu/ridge_kernels.h"

namespace kernelmeta {
namespace {

template <class C>
constexpr Kernels<C> kKernels = {sib_forward<C>,
                                 sib_backward<C>,
                                 sib_training<C>,
                                 mlp_forward<C>,
                                 mlp_backward<C>,
                                 class_means_forward<C>,
                                 class_means_backward<C>,
                                 linear_head_forward<C>,
                                 linear_head_backward<C>,
                                 linear_head_training<C>,
                                 program_forward<C>,
                                 program_backward<C>,
                                 ridge_forward<C>,
                                 ridge_backward<C>,
                                 focal_distillation_forward<C>,
                                 focal_distillation_backward<C>,
                                 linearised_descent_forward<C>,
                                 linearised_descent_backward<C>,
                                 ntk_gram_forward<C>,
                                 ntk_gram_backward<C>};

}  // namespace

extern const KernelTable KERNELMETA_JOIN(kernels_, KERNELMETA_ISA);
const KernelTable KERNELMETA_JOIN(kernels_, KERNELMETA_ISA) = {KERNELMETA_STRING(KERNELMETA_ISA),
                                                               kKernels<float>, kKernels<double>};

}  // namespace kernelmeta
