// One task of `linear_head`, from its features to its logits and back.
#pragma once

#include "engine/linear_head.h"
#include "engine/problem.h"

namespace kernelmeta {

template <class C>
struct HeadProblem {
  Sizes s;  // T, S, Q, N, D, K
  Features support, query;
  const int64_t* labels;           // [T][S]
  const C *weight, *bias, *rates;  // [N][D], [N], [K]
  Oracle oracle;
  bool first_order;
};

template <class C>
struct HeadForward {
  HeadProblem<C> problem;
  C* logits;  // [T][Q][N]
  C* heads;   // [T][N][D + 1] or null
  C* trace;   // [T][head_trace_size] or null
};

template <class C>
struct HeadBackward {
  HeadProblem<C> problem;
  const C* trace;
  const C* grad_logits;  // [T][Q][N]
  const C* grad_heads;   // [T][N][D + 1] or null
  C* grad_support;       // [T][S][D] or null
  C* grad_query;         // [T][Q][D] or null
};

// Sums over tasks.
template <class C>
struct HeadParameterGrad {
  C *weight, *bias, *rates;

  KERNELMETA_INLINE HeadParameterGrad(Arena<C>& arena, const Sizes& s)
      : weight(arena.take(s.N * s.D)), bias(arena.take(s.N)), rates(arena.take(s.K)) {}
};

// Elements that a task's trace takes.
template <class C>
KERNELMETA_INLINE int64_t head_trace_size(const Sizes& s) {
  Arena<C> count;
  HeadTrace<C> unused(count, s);
  return count.used();
}

// What forward and backward both need to work on one task.
template <class B>
struct HeadTask {
  using C = typename B::Scalar;

  B& block;
  const HeadProblem<C>& p;
  C *support_buffer, *query_buffer;
  C* y;

  KERNELMETA_INLINE HeadTask(Arena<C>& arena, B& block, const HeadProblem<C>& p)
      : block(block),
        p(p),
        support_buffer(B::widening_buffer(arena, p.support, p.s.D)),
        query_buffer(B::widening_buffer(arena, p.query, p.s.D)),
        y(arena.take(p.s.N * padded(p.s.S))) {}

  KERNELMETA_INLINE LinearHead<B> head(int64_t t, const HeadTrace<C>& trace) const {
    return {block,
            p.s,
            p.oracle,
            p.first_order,
            p.weight,
            p.bias,
            p.rates,
            B::task_rows(p.support, t, p.s.D, support_buffer),
            B::task_rows(p.query, t, p.s.D, query_buffer),
            p.labels + t * p.s.S,
            y,
            trace};
  }

  KERNELMETA_INLINE void forward(LinearHead<B>& head, const HeadForward<C>& f, int64_t t,
                                 const typename LinearHead<B>::Scratch& scratch) const {
    const Sizes& s = p.s;
    head.forward(scratch, f.logits + t * s.Q * s.N, f.heads ? f.heads + t * s.N * (s.D + 1) : nullptr);
  }

  // Adds to `grad`.
  KERNELMETA_INLINE void backward(LinearHead<B>& head, const HeadBackward<C>& f, int64_t t,
                                  const typename LinearHead<B>::Adjoint& adjoint,
                                  const HeadParameterGrad<C>& grad) const {
    const Sizes& s = p.s;
    head.backward(adjoint, f.grad_logits + t * s.Q * s.N,
                  f.grad_heads ? f.grad_heads + t * s.N * (s.D + 1) : nullptr,
                  f.grad_support ? f.grad_support + t * s.S * s.D : nullptr,
                  f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, grad.weight, grad.bias, grad.rates);
  }
};

}  // namespace kernelmeta
