// One task of `ridge`, from its features to its logits and back.
#pragma once

#include "engine/ridge.h"
#include "engine/sib_task.h"
#include "engine/task_rows.h"

namespace kernelmeta {

template <class C>
struct RidgeProblem {
  int64_t T, N, D;  // N: of the task that has most
  TaskRows support, query;
  TaskClasses classes;
  const C *lambda, *scale, *bias;

  KERNELMETA_INLINE Sizes sizes(int64_t t) const {
    return {1, support.count(t), query.count(t), classes.count(t, N), D, 0, 0};
  }
  KERNELMETA_INLINE static bool every_class() { return true; }
};

template <class C>
struct RidgeForward {
  RidgeProblem<C> problem;
  C* logits;        // [sum Q][N]
  C* coefficients;  // [sum S][N]
  C* trace;         // or null
};

// Sums over tasks.
template <class C>
struct RidgeGrad {
  C *lambda, *scale, *bias;

  KERNELMETA_INLINE explicit RidgeGrad(Arena<C>& arena)
      : lambda(arena.take(1)), scale(arena.take(1)), bias(arena.take(1)) {}
};

template <class C>
struct RidgeBackward {
  RidgeProblem<C> problem;
  const C* trace;
  const C* grad_logits;
  const C* grad_coefficients;    // [sum S][N] or null
  C *grad_support, *grad_query;  // or null
};

// Elements that the trace of a task takes.
template <class C>
KERNELMETA_INLINE int64_t ridge_trace_size(const Sizes& s) {
  Arena<C> count;
  RidgeTrace<C> unused(count, s);
  return count.used();
}

// What forward and backward both need to work on one task. It stays where it is: its parts point at each
// other. The trace must be there, full of zeros at the start of the forward pass, when they are called.
template <class B>
struct RidgeTask {
  using C = typename B::Scalar;

  B& block;
  const RidgeProblem<C>& p;
  const int64_t t;
  const Sizes s;
  C *support_buffer, *query_buffer;
  TaskMembers<B> members;
  RidgeTrace<C> trace;
  Ridge<B> ridge;

  KERNELMETA_INLINE RidgeTask(Arena<C>& arena, B& block, const RidgeProblem<C>& p, int64_t t)
      : block(block),
        p(p),
        t(t),
        s(p.sizes(t)),
        support_buffer(B::widening_buffer(arena, p.support.of(t), p.D)),
        query_buffer(B::widening_buffer(arena, p.query.of(t), p.D)),
        members(arena, p.classes, t, p.support.first(t), s.S, s.N, p.N),
        trace(),
        ridge{block, s, {}, {}, trace, *p.lambda, *p.scale, *p.bias} {}
  RidgeTask(const RidgeTask&) = delete;

  // The trace lies at `base`; the rows are looked at.
  KERNELMETA_INLINE void bind(C* base) {
    Arena<C> arena(base);
    trace = RidgeTrace<C>(arena, s);
    ridge.support = B::task_rows(p.support.of(t), 0, p.D, support_buffer);
    ridge.query = B::task_rows(p.query.of(t), 0, p.D, query_buffer);
  }

  // Before forward, a barrier between them.
  KERNELMETA_INLINE void prepare() const { members.sort(block, s.S, s.N); }

  // False, in *regular, where the system is singular: the results are NaN then, or nothing of use.
  KERNELMETA_INLINE void forward(const RidgeForward<C>& f, bool* regular) {
    one_hot(block, members.members, s.S, s.N, trace.alpha, static_cast<C*>(nullptr));
    ridge.forward(regular);
    ridge.logits(p.N, f.logits + p.query.first(t) * p.N);
    rows_out(block, trace.alpha, padded(s.S), s.N, s.S, p.N, f.coefficients + p.support.first(t) * p.N);
  }

  // Adds to `grad`.
  KERNELMETA_INLINE void backward(const RidgeBackward<C>& f, const RidgeGrad<C>& grad,
                                  const typename Ridge<B>::Scratch& scratch) {
    const int64_t support_first = p.support.first(t), query_first = p.query.first(t);
    ridge.backward(f.grad_logits + query_first * p.N,
                   f.grad_coefficients ? f.grad_coefficients + support_first * p.N : nullptr, p.N, scratch,
                   grad.lambda, grad.scale, grad.bias,
                   f.grad_support ? f.grad_support + support_first * p.D : nullptr,
                   f.grad_query ? f.grad_query + query_first * p.D : nullptr);
  }
};

}  // namespace kernelmeta
