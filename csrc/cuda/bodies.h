// What one thread block does in each kernel: its share of the tasks, one after the other, in its own memory.
//
// A Layout lays out that memory: on the host to count it, in the kernel for real. What stands first in it is
// what most deserves shared memory; what does not fit there lies in the block's part of a workspace in global
// memory.
#pragma once

#include <new>

#include "cuda/block.h"
#include "engine/focal_distillation.h"
#include "engine/linear_head_task.h"
#include "engine/mlp_task.h"
#include "engine/sib_task.h"
#include "engine/sum_parts.h"

namespace kernelmeta {

// Elements that a block lays out, in shared memory and in the workspace.
struct Used {
  int64_t shared = 0, workspace = 0;
};

// Which tasks a block takes: first, first + step, ...
struct BlockTasks {
  int64_t first, step;
};

// The block's view of its memory, once for all of its threads, in shared memory: several dozen pointers,
// which each thread would otherwise keep in registers. A Layout is constructed from an arena, the block and
// the sizes, then args.
template <class B, class Layout>
struct BlockMemory {
  B block;
  Layout w;

  template <class C, class... Args>
  KERNELMETA_INLINE BlockMemory(Arena<C> arena, const Sizes& s, const Args&... args)
      : w(arena, block, as<typename B::Sizes>(s), args...) {}

  // In `place`, by one thread of the team. A function of its own: it takes more registers than anything else.
  template <class C, class... Args>
  static __host__ __device__ KERNELMETA_NOINLINE void construct(void* place, const Arena<C>& arena,
                                                                const Sizes& s, const Args&... args) {
    new (place) BlockMemory(arena, s, args...);
  }
  template <class C, class... Args>
  static KERNELMETA_INLINE BlockMemory& make(void* place, const Arena<C>& arena, const Sizes& s,
                                             const Args&... args) {
    B().each_item(1, [&](int64_t) { construct(place, arena, s, args...); });
    return *static_cast<BlockMemory*>(place);
  }
};

// Where a task's trace lies: what is of D dimensions always in the trace that is kept (or beside it), the
// rest in the block's own memory if that is shared memory, and is copied out or in.
template <class C>
struct TraceMemory {
  int64_t of_features, elements;  // in D dimensions; the rest
  bool gram, weights;
  C* own;  // null: the kept trace itself

  // `features` [of_features], `rest` [elements]
  template <class S>
  KERNELMETA_INLINE static Trace<C> lay_out(C* features, C* rest, const S& s, bool gram, bool weights) {
    Arena<C> first(features), second(rest);
    return Trace<C>(first, second, s, gram, weights);
  }

  template <class S>
  KERNELMETA_INLINE TraceMemory(Arena<C>& arena, const S& s, bool gram, bool weights, bool kept)
      : gram(gram), weights(weights) {
    Arena<C> features, rest;
    Trace<C> unused(features, rest, s, gram, weights);
    of_features = features.used();
    elements = rest.used();
    own = kept && !arena.fits(elements) ? nullptr : arena.take(elements);
  }

  KERNELMETA_INLINE C* rest(C* kept) const { return kept + of_features; }

  // kept: the task's trace, what is of D dimensions first.
  template <class S>
  KERNELMETA_INLINE Trace<C> at(C* kept, const S& s) const {
    return lay_out(kept, own ? own : rest(kept), s, gram, weights);
  }
};

template <class B>
struct SibForwardLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  FoldedMlp<C> mlp;
  SibTask<B> task;
  TraceMemory<C> trace;
  C* features;       // what of the trace is of D dimensions; null: in the kept trace
  Trace<C> of_task;  // in shared memory like all of this, not in every thread's registers

  KERNELMETA_INLINE SibForwardLayout(Arena<C>& arena, B& block, const Sizes& s, const SibForward<C>& f,
                                     C scale, C bias)
      : mlp(arena, s, f.problem.running != nullptr),
        task(arena, block, s, f.problem, mlp, scale, bias, forms_gram(s, true), false),
        trace(arena, s, forms_gram(s, true), f.problem.weights, f.trace != nullptr),
        features(f.trace ? nullptr : arena.take_aside(trace.of_features, !trace.gram)) {}
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void sib_forward_body(void* place, const SibForward<C>& f, int64_t stride, Arena<C> arena,
                                        BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(f.problem.s);
  auto& [block, w] = BlockMemory<B, SibForwardLayout<B>>::make(place, arena, f.problem.s, f, *f.problem.scale,
                                                               *f.problem.bias);
  fold(block, f.problem.mlp, f.problem.running, s, w.mlp);
  const int64_t stats = s.K * 4 * s.H;
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (w.task.invalid(t)) {
      fill_nan(block, f.logits + t * s.Q * s.N, s.Q * s.N);
      fill_nan(block, f.weights ? f.weights + t * s.N * s.D : nullptr, s.N * s.D);
      fill_nan(block, f.stats ? f.stats + t * stats : nullptr, stats);
      fill_nan(block, kept, stride);
      continue;
    }
    block.each_item(1, [&](int64_t) {
      new (&w.of_task)
          Trace<C>(kept ? w.trace.at(kept, s)
                        : TraceMemory<C>::lay_out(w.features, w.trace.own, s, w.trace.gram, w.trace.weights));
    });
    if (kept) w.of_task.clear_padding(block, s);
    w.task.forward(f, t, w.of_task);
    if (kept && w.trace.own) {
      C* rest = w.trace.rest(kept);
      block.unfenced().copy(w.trace.elements, w.trace.own, rest);
    }
  }
}

template <class B>
struct SibBackwardLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  FoldedMlp<C> mlp;
  SibTask<B> task;
  typename SibTask<B>::Adjoint adjoint;
  TraceMemory<C> trace;
  Trace<C> of_task;
  int64_t size;
  C* sums;  // [size], laid out as `grad`
  C* gtheta0;
  Arena<C> of_sums;
  SibParameterGrad<C> grad;

  KERNELMETA_INLINE static int64_t sums_size(const Sizes& s) {
    Arena<C> count;
    SibParameterGrad<C> unused(count, s);
    return count.used();
  }

  KERNELMETA_INLINE SibBackwardLayout(Arena<C>& arena, B& block, const Sizes& s, const SibBackward<C>& f,
                                      C scale, C bias)
      : mlp(arena, s, f.problem.running != nullptr),
        task(arena, block, s, f.problem, mlp, scale, bias, forms_gram(s, true), true),
        adjoint(arena, s, forms_gram(s, true), f.grad_query != nullptr, f.grad_weights != nullptr),
        trace(arena, s, forms_gram(s, true), f.problem.weights, true),
        size(sums_size(s)),
        sums(arena.take(size)),
        gtheta0(arena.take(s.N * s.D)),
        of_sums(sums),
        grad(of_sums, s) {}
};

// partial: the block's own sums over its tasks, a SibParameterGrad.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void sib_backward_body(void* place, const SibBackward<C>& f, int64_t stride, C* partial,
                                         Arena<C> arena, BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(f.problem.s);
  auto& [block, w] = BlockMemory<B, SibBackwardLayout<B>>::make(place, arena, f.problem.s, f,
                                                                *f.problem.scale, *f.problem.bias);
  fold(block, f.problem.mlp, f.problem.running, s, w.mlp);
  block.unfenced().each_item(w.size, [&](int64_t i) { w.sums[i] = C(0); });
  const int64_t start_size = f.problem.start.rows * s.D;
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    if (w.task.invalid(t)) {
      fill_sums_with_nan(block, w.sums, w.size);
      fill_nan(block, f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, s.Q * s.D);
      fill_nan(block, f.grad_start ? f.grad_start + t * start_size : nullptr, start_size);
      continue;
    }
    C* kept = const_cast<C*>(f.trace) + t * stride;
    if (w.trace.own) {
      const C* rest = w.trace.rest(kept);
      block.unfenced().copy(w.trace.elements, rest, w.trace.own);
    }
    block.each_item(1, [&](int64_t) { new (&w.of_task) Trace<C>(w.trace.at(kept, s)); });
    w.task.backward(f, t, w.of_task, w.adjoint, w.grad, w.gtheta0);
  }
  block.unfenced().copy(w.size, w.sums, partial);
}

template <class B>
struct MlpLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  FoldedMlp<C> mlp;
  MlpTask<B> task;
  int64_t size;
  C* sums;  // [size], laid out as `grad`; with a backward pass only
  Arena<C> of_sums;
  FoldedMlpGrad<C> grad;

  KERNELMETA_INLINE static int64_t sums_size(const Sizes& s) {
    Arena<C> count;
    FoldedMlpGrad<C> unused(count, s);
    return count.used();
  }

  KERNELMETA_INLINE MlpLayout(Arena<C>& arena, B& block, const Sizes& s, const MlpProblem<C>& p,
                              bool backward)
      : mlp(arena, s, p.running != nullptr),
        task(arena, block, s, mlp, backward),
        size(sums_size(s)),
        sums(backward ? arena.take(size) : nullptr),
        of_sums(sums),
        grad(of_sums, s) {}
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void mlp_forward_body(void* place, const MlpProblem<C>& p, C* out, Arena<C> arena,
                                        BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = BlockMemory<B, MlpLayout<B>>::make(place, arena, p.s, p, false);
  fold(block, p.mlp, p.running, s, w.mlp);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    w.task.forward(p.logits + t * s.Q * s.N, out + t * s.Q * s.N);
  }
}

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void mlp_backward_body(void* place, const MlpProblem<C>& p, const C* grad_out,
                                         C* grad_logits, C* partial, Arena<C> arena, BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = BlockMemory<B, MlpLayout<B>>::make(place, arena, p.s, p, true);
  fold(block, p.mlp, p.running, s, w.mlp);
  block.unfenced().each_item(w.size, [&](int64_t i) { w.sums[i] = C(0); });
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    const int64_t at = t * s.Q * s.N;
    w.task.backward(p.logits + at, grad_out + at, grad_logits + at, w.grad);
  }
  block.unfenced().copy(w.size, w.sums, partial);
}

template <class B>
struct ClassMeansLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  SortedClasses<B> classes;
  C* inverse;
  C* sum;  // [D], gradient of the weight; with a backward pass only

  KERNELMETA_INLINE ClassMeansLayout(Arena<C>& arena, B&, const Sizes& s, bool backward)
      : classes(arena, s, true), inverse(arena.take(s.S)), sum(backward ? arena.take(s.D) : nullptr) {}

  KERNELMETA_INLINE ClassMeans<B> task(B& block, const Sizes& s, const ClassMeansProblem<C>& p,
                                       int64_t t) const {
    return {block,    s,      B::task_rows(p.support, t, s.D, nullptr), classes.of(block, p.classes, t, s),
            p.weight, inverse};
  }
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void class_means_forward_body(void* place, const ClassMeansProblem<C>& p, C* theta0,
                                                Arena<C> arena, BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = BlockMemory<B, ClassMeansLayout<B>>::make(place, arena, p.s, false);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* to = theta0 + t * s.N * s.D;
    if (is_invalid(block, t, s, p.classes.labels, true, p.support, nullptr)) {
      fill_nan(block, to, s.N * s.D);
      continue;
    }
    w.task(block, s, p, t).forward(to);
  }
}

// partial [D]: the block's own sum over its tasks; written only where there is a weight.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void class_means_backward_body(void* place, const ClassMeansProblem<C>& p,
                                                 const C* grad_theta0, C* grad_support, C* partial,
                                                 Arena<C> arena, BlockTasks tasks) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = BlockMemory<B, ClassMeansLayout<B>>::make(place, arena, p.s, true);
  C* sum = p.weight ? w.sum : nullptr;
  block.unfenced().each_item(s.D, [&](int64_t d) { w.sum[d] = C(0); });
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* to = grad_support ? grad_support + t * s.S * s.D : nullptr;
    if (is_invalid(block, t, s, p.classes.labels, true, p.support, nullptr)) {
      fill_nan(block, to, s.S * s.D);
      fill_sums_with_nan(block, w.sum, s.D);
      continue;
    }
    w.task(block, s, p, t).backward(grad_theta0 + t * s.N * s.D, to, sum);
  }
  if (sum) block.unfenced().each_item(s.D, [&](int64_t d) { partial[d] = sum[d]; });
}

// Where what a task leaves for its backward pass lies: in the block's own memory if that is shared memory, to
// be copied out or in; else where it is kept.
template <class C>
struct KeptMemory {
  int64_t elements;
  C* own;  // null: where it is kept

  KERNELMETA_INLINE KeptMemory(Arena<C>& arena, int64_t elements, bool kept)
      : elements(elements), own(kept && !arena.fits(elements) ? nullptr : arena.take(elements)) {}

  KERNELMETA_INLINE C* at(const C* kept) const { return own ? own : const_cast<C*>(kept); }
  // The caller's barriers part the copies from what is done with them.
  template <class B>
  KERNELMETA_INLINE void copy_out(B& block, C* kept) const {
    if (own && kept) block.unfenced().copy(elements, own, kept);
  }
  template <class B>
  KERNELMETA_INLINE void copy_in(B& block, const C* kept) const {
    if (own) block.unfenced().copy(elements, kept, own);
  }
};

template <class B>
struct HeadForwardLayout {
  using C = typename B::Scalar;

  HeadTask<B> task;
  typename LinearHead<B>::Scratch scratch;
  KeptMemory<C> trace;
  LinearHead<B> head;  // of one task

  KERNELMETA_INLINE HeadForwardLayout(Arena<C>& arena, B& block, const Sizes& s, const HeadForward<C>& f)
      : task(arena, block, f.problem),
        scratch(arena, s),
        trace(arena, head_trace_size<C>(s), f.trace != nullptr),
        head(at(0, f.trace)) {}

  // The head of task t, whose trace is kept at `kept`; for one thread.
  KERNELMETA_INLINE LinearHead<B> at(int64_t t, const C* kept) const {
    Arena<C> of_trace(trace.at(kept));
    return task.head(t, HeadTrace<C>(of_trace, task.p.s));
  }
};

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void head_forward_body(void* place, const HeadForward<C>& f, int64_t stride, Arena<C> arena,
                                         BlockTasks tasks) {
  const HeadProblem<C>& p = f.problem;
  const Sizes& s = p.s;
  auto& [block, w] = BlockMemory<B, HeadForwardLayout<B>>::make(place, arena, s, f);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (is_invalid(block, t, s, p.labels, false, p.support, &p.query)) {
      fill_nan(block, f.logits + t * s.Q * s.N, s.Q * s.N);
      fill_nan(block, f.heads ? f.heads + t * s.N * (s.D + 1) : nullptr, s.N * (s.D + 1));
      fill_nan(block, kept, stride);
      continue;
    }
    block.unfenced().features_zero(1, stride, w.trace.at(kept));
    block.each_item(1, [&](int64_t) { new (&w.head) LinearHead<B>(w.at(t, kept)); });
    w.task.forward(w.head, f, t, w.scratch);
    w.trace.copy_out(block, kept);
  }
}

// A gradient of parameters, summed over a block's tasks: `size` elements, laid out as a Grad.
template <class Grad, class C>
struct BlockSums {
  int64_t size;
  C* sums;
  Arena<C> of_sums;
  Grad grad;

  template <class... Args>
  KERNELMETA_INLINE static int64_t size_of(const Args&... args) {
    Arena<C> count;
    Grad unused(count, args...);
    return count.used();
  }

  template <class... Args>
  KERNELMETA_INLINE explicit BlockSums(Arena<C>& arena, const Args&... args)
      : size(size_of(args...)), sums(arena.take(size)), of_sums(sums), grad(of_sums, args...) {}

  template <class B>
  KERNELMETA_INLINE void clear(B& block) const {
    block.unfenced().features_zero(1, size, sums);
  }
  template <class B>
  KERNELMETA_INLINE void copy_out(B& block, C* partial) const {
    block.unfenced().copy(size, sums, partial);
  }
};

template <class B>
struct HeadBackwardLayout {
  using C = typename B::Scalar;

  HeadTask<B> task;
  typename LinearHead<B>::Adjoint adjoint;
  KeptMemory<C> trace;
  BlockSums<HeadParameterGrad<C>, C> sums;
  LinearHead<B> head;  // of one task

  KERNELMETA_INLINE HeadBackwardLayout(Arena<C>& arena, B& block, const Sizes& s, const HeadBackward<C>& f)
      : task(arena, block, f.problem),
        adjoint(arena, s, f.grad_support != nullptr && !f.problem.first_order),
        trace(arena, head_trace_size<C>(s), true),
        sums(arena, s),
        head(at(0, f.trace)) {}

  KERNELMETA_INLINE LinearHead<B> at(int64_t t, const C* kept) const {
    Arena<C> of_trace(trace.at(kept));
    return task.head(t, HeadTrace<C>(of_trace, task.p.s));
  }
};

// partial: the block's own sums over its tasks, a HeadParameterGrad.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void head_backward_body(void* place, const HeadBackward<C>& f, int64_t stride, C* partial,
                                          Arena<C> arena, BlockTasks tasks) {
  const HeadProblem<C>& p = f.problem;
  const Sizes& s = p.s;
  auto& [block, w] = BlockMemory<B, HeadBackwardLayout<B>>::make(place, arena, s, f);
  w.sums.clear(block);
  for (int64_t t = tasks.first; t < s.T; t += tasks.step) {
    if (is_invalid(block, t, s, p.labels, false, p.support, &p.query)) {
      fill_sums_with_nan(block, w.sums.sums, w.sums.size);
      fill_nan(block, f.grad_support ? f.grad_support + t * s.S * s.D : nullptr, s.S * s.D);
      fill_nan(block, f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, s.Q * s.D);
      continue;
    }
    const C* kept = f.trace + t * stride;
    w.trace.copy_in(block, kept);
    block.each_item(1, [&](int64_t) { new (&w.head) LinearHead<B>(w.at(t, kept)); });
    w.task.backward(w.head, f, t, w.adjoint, w.sums.grad);
  }
  w.sums.copy_out(block, partial);
}

// to = factor * sum_b partials[b][..size], in an order that depends on `count` alone. A block takes kLanes
// neighbouring entries, its warps every kWarps-th partial.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void sum_partials_body(const C* partials, int64_t count, int64_t size, C factor,
                                         const SumParts<C>& to, BlockTasks tasks) {
  constexpr int kLanes = B::kLanes, kWarps = B::kWarps;
  const B block;
  C* const stage = B::stage();
  for (int64_t base = tasks.first * kLanes; base < size; base += tasks.step * kLanes) {
    block.each_item(kLanes * kWarps, [&](int64_t i) {
      const int64_t at = base + i % kLanes;
      C sum = 0;
      if (at < size) {
#pragma unroll 8
        for (int64_t b = i / kLanes; b < count; b += kWarps) sum += partials[b * size + at];
      }
      stage[i] = sum;
    });
    block.each_item(kLanes, [&](int64_t i) {
      C sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += stage[w * kLanes + i];
      if (base + i < size) to.store(base + i, factor * sum);
    });
  }
}

// Where the gradients of the parameters go. scale, bias, weight: null, or what lies behind the MLP's in a
// SibParameterGrad.
// sums: a FoldedMlpGrad.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void unfold_body(const Sizes& sizes, const MlpArrays<const C>& mlp, C* sums,
                                   const MlpArrays<C>& to) {
  B block;
  const auto& s = as<typename B::Sizes>(sizes);
  Arena<C> arena(sums);
  unfold(block, mlp, FoldedMlpGrad<C>(arena, s), s, to);
}

// A block takes as many rows at a time as it has warps.
template <class B, class Fn>
KERNELMETA_INLINE void rows_of_block(int64_t R, BlockTasks tasks, Fn f) {
  for (int64_t first = tasks.first * B::kWarps; first < R; first += tasks.step * B::kWarps) {
    f(first, R - first < B::kWarps ? R - first : B::kWarps);
  }
}

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void distillation_forward_body(const DistillationForward<C>& f, Arena<C> arena,
                                                 BlockTasks tasks) {
  B block;
  DistillationRows<B> rows(arena, block, f.problem, B::kWarps, false);
  rows_of_block<B>(f.problem.R, tasks, [&](int64_t first, int64_t count) { rows.forward(f, first, count); });
}

template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void distillation_backward_body(const DistillationBackward<C>& f, Arena<C> arena,
                                                  BlockTasks tasks) {
  B block;
  DistillationRows<B> rows(arena, block, f.problem, B::kWarps, true);
  rows_of_block<B>(f.problem.R, tasks, [&](int64_t first, int64_t count) { rows.backward(f, first, count); });
}

}  // namespace kernelmeta
