// What runs on neural tangent kernels, over a range of tasks; part of kernels.cpp.
#pragma once

#include "engine/linearised_descent.h"

namespace kernelmeta {
namespace {

template <class C, class Own>
struct DescentWorkspace {
  CpuBlock<C> block;
  LinearisedDescent<CpuBlock<C>> task;
  Own own;
  C* trace;

  DescentWorkspace(Arena<C>& arena, const DescentProblem<C>& p, bool own_trace)
      : task(arena, block, p),
        own(arena, p),
        trace(own_trace ? arena.take(descent_trace_size<C>(p)) : nullptr) {}
};

template <class C>
void linearised_descent_forward(const DescentForward<C>& f, int64_t begin, int64_t end) {
  using Task = LinearisedDescent<CpuBlock<C>>;
  const int64_t stride = descent_trace_size<C>(f.problem);
  const bool own_trace = f.trace == nullptr;
  auto w = in_scratch<DescentWorkspace<C, typename Task::Forward>, C>(f.problem, own_trace);
  for (int64_t t = begin; t < end; ++t) {
    w.task.bind(t, own_trace ? w.trace : f.trace + t * stride);
    w.task.prepare(t);
    w.task.forward(f, t, w.own);
  }
}

template <class C>
void linearised_descent_backward(const DescentBackward<C>& f, const DescentGrad<C>& grad, int64_t begin,
                                 int64_t end) {
  using Task = LinearisedDescent<CpuBlock<C>>;
  const int64_t stride = descent_trace_size<C>(f.problem);
  auto w = in_scratch<DescentWorkspace<C, typename Task::Backward>, C>(f.problem, false);
  for (int64_t t = begin; t < end; ++t) {
    w.task.bind(t, const_cast<C*>(f.trace) + t * stride);
    w.task.prepare(t);
    w.task.backward(f, t, w.own, grad);
  }
}

}  // namespace
}  // namespace kernelmeta
