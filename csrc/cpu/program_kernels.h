// Programs over a range of tasks; part of kernels.cpp, which is compiled once for each instruction set.
#pragma once

#include "engine/program_task.h"

namespace kernelmeta {
namespace {

// Scratch for the largest of the tasks, laid out anew for each.
template <class Workspace, class C, class... Args>
C* scratch_for_tasks(int64_t begin, int64_t end, const Args&... args) {
  int64_t most = 0;
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> count;
    {
      Workspace unused(count, args..., t);
    }
    most = most > count.used() ? most : count.used();
  }
  return static_cast<C*>(scratch(most * int64_t(sizeof(C))));
}

template <class C>
struct ProgramForwardWorkspace {
  CpuBlock<C> block;
  ProgramTask<CpuBlock<C>> task;
  C* own_trace;
  ProgramForwardWorkspace(Arena<C>& arena, const ProgramProblem<C>& p, const KernelCall<C>& call,
                          bool keeps_trace, int64_t t)
      : task(arena, block, p, call.phases, call.mlp, t),
        own_trace(keeps_trace ? nullptr : arena.take(program_trace_size(p, task.shape))) {}
};

template <class C>
void program_forward(const ProgramForward<C>& f, const KernelCall<C>& call, int64_t begin, int64_t end) {
  const ProgramProblem<C>& p = f.problem;
  const bool keeps_trace = f.trace != nullptr;
  C* memory = scratch_for_tasks<ProgramForwardWorkspace<C>, C>(begin, end, p, call, keeps_trace);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    ProgramForwardWorkspace<C> w(arena, p, call, keeps_trace, t);
    C* trace = keeps_trace ? f.trace + call.trace_offsets[t] : w.own_trace;
    memset(trace, 0, sizeof(C) * program_trace_size(p, w.task.shape));
    w.task.bind(trace);
    w.task.forward(f);
  }
}

template <class C>
struct ProgramBackwardWorkspace {
  using Block = CpuBlock<C>;
  Block block;
  ProgramTask<Block> task;
  typename ProgramLoop<Block>::Adjoint adjoint;
  typename ProgramFeatures<Block>::Scratch scratch;
  C* gtheta0;

  ProgramBackwardWorkspace(Arena<C>& arena, const ProgramProblem<C>& p, const KernelCall<C>& call,
                           bool row_gradients, int64_t t)
      : task(arena, block, p, call.phases, call.mlp, t),
        adjoint(arena, task.shape),
        scratch(arena, task.shape, row_gradients),
        gtheta0(arena.take(p.start == Start::kClassMeans ? task.shape.N * p.D : 0)) {}
};

template <class C>
void program_backward(const ProgramBackward<C>& f, const KernelCall<C>& call, const ProgramGrad<C>& grad,
                      int64_t begin, int64_t end) {
  const bool row_gradients = f.grad_support || f.grad_query;
  C* memory = scratch_for_tasks<ProgramBackwardWorkspace<C>, C>(begin, end, f.problem, call, row_gradients);
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    ProgramBackwardWorkspace<C> w(arena, f.problem, call, row_gradients, t);
    w.task.bind(const_cast<C*>(f.trace) + call.trace_offsets[t]);
    w.task.backward(f, grad, w.adjoint, w.scratch, w.gtheta0);
  }
}

}  // namespace
}  // namespace kernelmeta
