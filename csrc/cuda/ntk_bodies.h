// What one thread block does in the kernels that run on neural tangent kernels; see bodies.h. Activations,
// derivatives and weights are larger than shared memory: products read them from global memory.
#pragma once

#include "cuda/bodies.h"
#include "engine/linearised_descent.h"
#include "engine/ntk_gram.h"

namespace kernelmeta {

// Own: what the task lays out besides.
template <class B, class Run, class Own>
struct DescentLayout {
  using C = typename B::Scalar;

  LinearisedDescent<B> task;
  Own own;
  KeptMemory<C> trace;

  KERNELMETA_INLINE DescentLayout(Arena<C>& arena, B& block, const Sizes&, const Run& f)
      : task(arena, block, f.problem),
        own(arena, f.problem),
        trace(arena, descent_trace_size<C>(f.problem), f.trace != nullptr) {}
};

template <class B, class C = typename B::Scalar>
using DescentForwardLayout = DescentLayout<B, DescentForward<C>, typename LinearisedDescent<B>::Forward>;
template <class B, class C = typename B::Scalar>
using DescentBackwardLayout = DescentLayout<B, DescentBackward<C>, typename LinearisedDescent<B>::Backward>;

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void descent_forward_body(void* place, const DescentForward<C>& f, int64_t stride,
                                            Arena<C> arena, BlockTasks tasks) {
  const Sizes s = f.problem.sizes();
  auto& [block, w] = BlockMemory<B, DescentForwardLayout<B>>::make(place, arena, s, f);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (is_invalid(block, t, s, nullptr, false, f.problem.support, &f.problem.query)) {
      fill_nan(block, f.outputs + t * s.Q * s.N, s.Q * s.N);
      fill_nan(block, f.coefficients + t * s.S * s.N, s.S * s.N);
      fill_nan(block, kept, stride);
      continue;
    }
    block.unfenced().features_zero(1, stride, w.trace.at(kept));
    block.each_item(1, [&](int64_t) { w.task.bind(t, w.trace.at(kept)); });
    w.task.prepare(t);
    w.task.forward(f, t, w.own);
    w.trace.copy_out(block, kept);
  }
}

// partial: the block's own sums over its tasks, a DescentGrad.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void descent_backward_body(void* place, const DescentBackward<C>& f, int64_t stride,
                                             C* partial, int64_t size, Arena<C> arena, BlockTasks tasks) {
  const Sizes s = f.problem.sizes();
  auto& [block, w] = BlockMemory<B, DescentBackwardLayout<B>>::make(place, arena, s, f);
  block.unfenced().features_zero(1, size, partial);
  Arena<C> of_sums(partial);
  const DescentGrad<C> grad(of_sums, f.problem.net);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    if (is_invalid(block, t, s, nullptr, false, f.problem.support, &f.problem.query)) {
      fill_nan(block, partial, size);
      fill_nan(block, f.grad_support ? f.grad_support + t * s.S * s.D : nullptr, s.S * s.D);
      fill_nan(block, f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, s.Q * s.D);
      fill_nan(block, f.grad_targets + t * s.S * s.N, s.S * s.N);
      fill_nan(block, f.grad_row_weights + t * s.S, s.S);
      continue;
    }
    const C* kept = f.trace + t * stride;
    w.trace.copy_in(block, kept);
    block.each_item(1, [&](int64_t) { w.task.bind(t, w.trace.at(kept)); });
    w.task.prepare(t);
    w.task.backward(f, t, w.own, grad);
  }
}

template <class B>
struct NtkForwardLayout {
  using C = typename B::Scalar;

  NtkGram<B> task;
  KeptMemory<C> trace;

  KERNELMETA_INLINE NtkForwardLayout(Arena<C>& arena, B& block, const Sizes&, const NtkForward<C>& f)
      : task(arena, block, f.problem), trace(arena, ntk_trace_size<C>(f.problem), f.trace != nullptr) {}
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void ntk_forward_body(void* place, const NtkForward<C>& f, int64_t stride, Arena<C> arena,
                                        BlockTasks tasks) {
  const NtkProblem<C>& p = f.problem;
  const Sizes s = p.sizes();
  auto& [block, w] = BlockMemory<B, NtkForwardLayout<B>>::make(place, arena, s, f);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (is_invalid(block, t, s, nullptr, false, p.support, &p.query)) {
      fill_nan(block, f.gram + t * s.S * s.S * p.pair(), s.S * s.S * p.pair());
      fill_nan(block, f.cross + t * s.Q * s.S * p.pair(), s.Q * s.S * p.pair());
      fill_nan(block, f.support_outputs + t * s.S * s.N, s.S * s.N);
      fill_nan(block, f.query_outputs + t * s.Q * s.N, s.Q * s.N);
      fill_nan(block, kept, stride);
      continue;
    }
    block.unfenced().features_zero(1, stride, w.trace.at(kept));
    block.each_item(1, [&](int64_t) { w.task.bind(t, w.trace.at(kept)); });
    w.task.forward(f, t);
    w.trace.copy_out(block, kept);
  }
}

template <class B>
struct NtkBackwardLayout {
  using C = typename B::Scalar;

  NtkGram<B> task;
  typename NtkGram<B>::Backward own;
  KeptMemory<C> trace;

  KERNELMETA_INLINE NtkBackwardLayout(Arena<C>& arena, B& block, const Sizes&, const NtkBackward<C>& f)
      : task(arena, block, f.problem),
        own(arena, f.problem),
        trace(arena, ntk_trace_size<C>(f.problem), true) {}
};

// partial: the block's own sums over its tasks, an NtkGrad.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void ntk_backward_body(void* place, const NtkBackward<C>& f, int64_t stride, C* partial,
                                         int64_t size, Arena<C> arena, BlockTasks tasks) {
  const NtkProblem<C>& p = f.problem;
  const Sizes s = p.sizes();
  auto& [block, w] = BlockMemory<B, NtkBackwardLayout<B>>::make(place, arena, s, f);
  block.unfenced().features_zero(1, size, partial);
  Arena<C> of_sums(partial);
  const NtkGrad<C> grad(of_sums, p.net);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    if (is_invalid(block, t, s, nullptr, false, p.support, &p.query)) {
      fill_nan(block, partial, size);
      fill_nan(block, f.grad_support ? f.grad_support + t * s.S * s.D : nullptr, s.S * s.D);
      fill_nan(block, f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, s.Q * s.D);
      continue;
    }
    const C* kept = f.trace + t * stride;
    w.trace.copy_in(block, kept);
    block.each_item(1, [&](int64_t) { w.task.bind(t, w.trace.at(kept)); });
    w.task.backward(f, t, w.own, grad);
  }
}

}  // namespace kernelmeta
