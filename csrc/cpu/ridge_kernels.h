// Ridge regression over a range of tasks; part of kernels.cpp.
#pragma once

#include "cpu/program_kernels.h"
#include "engine/ridge_task.h"

namespace kernelmeta {
namespace {

template <class C>
struct RidgeForwardWorkspace {
  CpuBlock<C> block;
  RidgeTask<CpuBlock<C>> task;
  C* own_trace;

  RidgeForwardWorkspace(Arena<C>& arena, const RidgeProblem<C>& p, bool keeps_trace, int64_t t)
      : task(arena, block, p, t),
        own_trace(keeps_trace ? nullptr : arena.take(ridge_trace_size<C>(task.s))) {}
};

template <class C>
void ridge_forward(const RidgeForward<C>& f, const int64_t* trace_offsets, bool* singular, int64_t begin,
                   int64_t end) {
  const bool keeps_trace = f.trace != nullptr;
  C* memory = scratch_for_tasks<RidgeForwardWorkspace<C>, C>(begin, end, f.problem, keeps_trace);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    RidgeForwardWorkspace<C> w(arena, f.problem, keeps_trace, t);
    C* trace = keeps_trace ? f.trace + trace_offsets[t] : w.own_trace;
    memset(trace, 0, sizeof(C) * ridge_trace_size<C>(w.task.s));
    w.task.bind(trace);
    w.task.prepare();
    bool regular = true;
    w.task.forward(f, &regular);
    singular[t] = !regular;
  }
}

template <class C>
struct RidgeBackwardWorkspace {
  CpuBlock<C> block;
  RidgeTask<CpuBlock<C>> task;
  typename Ridge<CpuBlock<C>>::Scratch scratch;

  RidgeBackwardWorkspace(Arena<C>& arena, const RidgeProblem<C>& p, bool row_gradients, int64_t t)
      : task(arena, block, p, t), scratch(arena, task.s, row_gradients) {}
};

template <class C>
void ridge_backward(const RidgeBackward<C>& f, const int64_t* trace_offsets, const RidgeGrad<C>& grad,
                    int64_t begin, int64_t end) {
  const bool row_gradients = f.grad_support || f.grad_query;
  C* memory = scratch_for_tasks<RidgeBackwardWorkspace<C>, C>(begin, end, f.problem, row_gradients);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    RidgeBackwardWorkspace<C> w(arena, f.problem, row_gradients, t);
    w.task.bind(const_cast<C*>(f.trace) + trace_offsets[t]);
    w.task.backward(f, grad, w.scratch);
  }
}

}  // namespace
}  // namespace kernelmeta
