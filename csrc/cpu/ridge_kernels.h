// Ridge regression over a range of tasks; part of kernels.cpp.
#pragma once

#include "cpu/program_kernels.h"
#include "engine/ridge.h"

namespace {

template <class C>
int64_t ridge_trace_size(const RidgeProblem<C>& p, int64_t t) {
  Arena<C> count;
  RidgeTrace<C> unused(count, p.sizes(t));
  return count.used();
}

template <class C>
struct RidgeWorkspace {
  using Scratch = typename Ridge<CpuBlock<C>>::Scratch;
  C *support_buffer, *query_buffer, *own_trace;
  Scratch scratch;

  RidgeWorkspace(Arena<C>& arena, const RidgeProblem<C>& p, bool keeps_trace, bool row_gradients, int64_t t)
      : support_buffer(widened_rows(arena, p.support, t, p.D)),
        query_buffer(widened_rows(arena, p.query, t, p.D)),
        own_trace(keeps_trace ? nullptr : arena.take(ridge_trace_size<C>(p, t))),
        scratch(arena, p.sizes(t), row_gradients) {}
};

template <class C>
void ridge_forward(const RidgeForward<C>& f, int64_t begin, int64_t end) {
  const RidgeProblem<C>& p = f.problem;
  const bool keeps_trace = f.trace != nullptr;
  C* memory = scratch_for_tasks<RidgeWorkspace<C>, C>(begin, end, p, keeps_trace, false);
  CpuBlock<C> block;
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    const RidgeWorkspace<C> w(arena, p, keeps_trace, false, t);
    const Sizes s = p.sizes(t);
    C* base = keeps_trace ? f.trace + p.trace_offsets[t] : w.own_trace;
    memset(base, 0, sizeof(C) * ridge_trace_size<C>(p, t));
    Arena<C> trace_arena(base);
    const RidgeTrace<C> trace(trace_arena, s);
    const int64_t ld = padded(s.S), first = p.support.offsets[t];
    const ClassMembers classes{p.members + first, p.class_offsets + t * (p.N + 1)};
    for (int64_t n = 0; n < s.N; ++n) {
      for (int32_t j = classes.offsets[n]; j < classes.offsets[n + 1]; ++j) {
        trace.alpha[n * ld + classes.members[j]] = 1;
      }
    }
    Ridge<CpuBlock<C>> ridge{block,
                             s,
                             widen(of_task(p.support, t), 0, p.D, w.support_buffer),
                             widen(of_task(p.query, t), 0, p.D, w.query_buffer),
                             trace,
                             p.lambda,
                             p.scale,
                             p.bias};
    bool regular = true;
    ridge.forward(&regular);
    f.singular[t] = !regular;
    ridge.logits(p.N, f.logits + p.query.offsets[t] * p.N);
    coefficients_out(trace.alpha, {0, s.S}, ld, s.N, s.S, p.N, f.coefficients + first * p.N);
  }
}

template <class C>
void ridge_backward(const RidgeBackward<C>& f, const RidgeGrad<C>& grad, int64_t begin, int64_t end) {
  const RidgeProblem<C>& p = f.problem;
  const bool row_gradients = f.grad_support || f.grad_query;
  C* memory = scratch_for_tasks<RidgeWorkspace<C>, C>(begin, end, p, true, row_gradients);
  CpuBlock<C> block;
  for (int64_t t = begin; t < end; ++t) {
    Arena<C> arena(memory);
    const RidgeWorkspace<C> w(arena, p, true, row_gradients, t);
    const Sizes s = p.sizes(t);
    Arena<C> trace_arena(const_cast<C*>(f.trace) + p.trace_offsets[t]);
    const RidgeTrace<C> trace(trace_arena, s);
    const int64_t support_first = p.support.offsets[t], query_first = p.query.offsets[t];
    Ridge<CpuBlock<C>> ridge{block,
                             s,
                             widen(of_task(p.support, t), 0, p.D, w.support_buffer),
                             widen(of_task(p.query, t), 0, p.D, w.query_buffer),
                             trace,
                             p.lambda,
                             p.scale,
                             p.bias};
    ridge.backward(f.grad_logits + query_first * p.N,
                   f.grad_coefficients ? f.grad_coefficients + support_first * p.N : nullptr, p.N, w.scratch,
                   grad.lambda, grad.scale, grad.bias,
                   f.grad_support ? f.grad_support + support_first * p.D : nullptr,
                   f.grad_query ? f.grad_query + query_first * p.D : nullptr);
  }
}

template <class C>
constexpr RidgeKernels<C> kRidgeKernels = {ridge_trace_size<C>, ridge_forward<C>, ridge_backward<C>};

}  // namespace
