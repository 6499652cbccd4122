// What runs on neural tangent kernels, over a range of tasks; part of kernels.cpp.
#pragma once

#include "engine/linearised_descent.h"
#include "engine/ntk_gram.h"

namespace kernelmeta {
namespace {

// in_scratch, of zeros.
template <class Workspace, class C, class... Args>
Workspace in_zeros(const Args&... args) {
  const int64_t bytes = size_of<Workspace, C>(args...) * int64_t(sizeof(C));
  C* memory = static_cast<C*>(scratch(bytes));
  memset(memory, 0, size_t(bytes));
  Arena<C> arena(memory);
  return Workspace(arena, args...);
}

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
    C* trace = own_trace ? w.trace : f.trace + t * stride;
    memset(trace, 0, sizeof(C) * size_t(stride));
    w.task.bind(t, trace);
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

template <class C>
struct NtkForwardWorkspace {
  CpuBlock<C> block;
  NtkGram<CpuBlock<C>> task;
  C* trace;

  NtkForwardWorkspace(Arena<C>& arena, const NtkProblem<C>& p, bool own_trace)
      : task(arena, block, p), trace(own_trace ? arena.take(ntk_trace_size<C>(p)) : nullptr) {}
};

template <class C>
void ntk_gram_forward(const NtkForward<C>& f, int64_t begin, int64_t end) {
  const int64_t stride = ntk_trace_size<C>(f.problem);
  auto w = in_zeros<NtkForwardWorkspace<C>, C>(f.problem, f.trace == nullptr);
  for (int64_t t = begin; t < end; ++t) {
    C* trace = f.trace ? f.trace + t * stride : w.trace;
    memset(trace, 0, sizeof(C) * size_t(stride));
    w.task.bind(t, trace);
    w.task.forward(f, t);
  }
}

template <class C>
struct NtkBackwardWorkspace {
  CpuBlock<C> block;
  NtkGram<CpuBlock<C>> task;
  typename NtkGram<CpuBlock<C>>::Backward backward;

  NtkBackwardWorkspace(Arena<C>& arena, const NtkProblem<C>& p) : task(arena, block, p), backward(arena, p) {}
};

template <class C>
void ntk_gram_backward(const NtkBackward<C>& f, const NtkGrad<C>& grad, int64_t begin, int64_t end) {
  const int64_t stride = ntk_trace_size<C>(f.problem);
  auto w = in_zeros<NtkBackwardWorkspace<C>, C>(f.problem);
  for (int64_t t = begin; t < end; ++t) {
    w.task.bind(t, const_cast<C*>(f.trace) + t * stride);
    w.task.backward(f, t, w.backward, grad);
  }
}

}  // namespace
}  // namespace kernelmeta
