// What one thread block does in each kernel: its share of the tasks, one after the other, in its own memory.
//
// A Layout lays out that memory: on the host to count it, in the kernel for real. What stands first in it is
// what most deserves shared memory; what does not fit there lies in the block's part of a workspace in global
// memory.
#pragma once

#include <new>

#include "cuda/block.h"
#include "engine/mlp_task.h"
#include "engine/sib_task.h"

namespace kernelmeta {

// Which tasks a block takes: first, first + step, ...
struct Share {
  int64_t first, step;
};

// The block's view of its memory, once for all of its threads, in shared memory: several dozen pointers,
// which each thread would otherwise keep in registers. A Layout is constructed from an arena, the block and
// the sizes, then args.
template <class B, class Layout>
struct Frame {
  B block;
  Layout w;

  template <class C, class... Args>
  __host__ __device__ __forceinline__ Frame(Arena<C> arena, const Sizes& s, const Args&... args)
      : w(arena, block, as<typename B::Sizes>(s), args...) {}

  // In `place`, by one thread of the team. A function of its own: it takes more registers than anything else.
  template <class C, class... Args>
  static __host__ __device__ KERNELMETA_NOINLINE void construct(void* place, const Arena<C>& arena,
                                                                const Sizes& s, const Args&... args) {
    new (place) Frame(arena, s, args...);
  }
  template <class C, class... Args>
  static __host__ __device__ __forceinline__ Frame& make(void* place, const Arena<C>& arena, const Sizes& s,
                                                         const Args&... args) {
    B().each_item(1, [&](int64_t) { construct(place, arena, s, args...); });
    return *static_cast<Frame*>(place);
  }
};

// Where a task's trace lies: theta0 always in the trace that is kept (or beside it), the rest in the block's
// own memory if that is shared memory, and is copied out or in.
template <class C>
struct TraceMemory {
  int64_t elements;  // without theta0
  bool gram, weights;
  C* own;  // null: the kept trace itself

  // `features` [N][D], `rest` [elements]
  template <class S>
  __host__ __device__ __forceinline__ static Trace<C> lay_out(C* features, C* rest, const S& s, bool gram,
                                                              bool weights) {
    Arena<C> first(features), second(rest);
    return Trace<C>(first, second, s, gram, weights);
  }

  template <class S>
  __host__ __device__ __forceinline__ TraceMemory(Arena<C>& arena, const S& s, bool gram, bool weights,
                                                  bool kept)
      : gram(gram), weights(weights) {
    Arena<C> features, rest;
    Trace<C> unused(features, rest, s, gram, weights);
    elements = rest.used();
    own = kept && !arena.fits(elements) ? nullptr : arena.take(elements);
  }

  // kept: the task's trace, theta0 first.
  template <class S>
  __host__ __device__ __forceinline__ Trace<C> at(C* kept, const S& s) const {
    C* rest = kept + padded(s.N * s.D);
    return lay_out(kept, own ? own : rest, s, gram, weights);
  }
};

template <class B>
struct SibForwardLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  FoldedMlp<C> mlp;
  SibTask<B> task;
  TraceMemory<C> trace;
  C* theta0;  // null: in the kept trace

  __host__ __device__ __forceinline__ SibForwardLayout(Arena<C>& arena, B& block, const Sizes& s,
                                                       const SibForward<C>& f, C scale, C bias)
      : mlp(arena, s, f.problem.running != nullptr),
        task(arena, block, s, f.problem, mlp, scale, bias, forms_gram(s, f.trace != nullptr), false),
        trace(arena, s, forms_gram(s, f.trace != nullptr), f.problem.weights, f.trace != nullptr),
        theta0(f.trace ? nullptr : arena.take(s.N * s.D)) {}
};

template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void sib_forward_body(void* place, const SibForward<C>& f, int64_t stride,
                                                          Arena<C> arena, Share share) {
  const auto& s = as<typename B::Sizes>(f.problem.s);
  auto& [block, w] =
      Frame<B, SibForwardLayout<B>>::make(place, arena, f.problem.s, f, *f.problem.scale, *f.problem.bias);
  fold(block, f.problem.mlp, f.problem.running, s, w.mlp);
  const int64_t stats = s.K * 4 * s.H;
  for (int64_t t = share.first; t < s.T; t += share.step) {
    C* kept = f.trace ? f.trace + t * stride : nullptr;
    if (w.task.invalid(t)) {
      fill_nan(block, f.logits + t * s.Q * s.N, s.Q * s.N);
      fill_nan(block, f.weights ? f.weights + t * s.N * s.D : nullptr, s.N * s.D);
      fill_nan(block, f.stats ? f.stats + t * stats : nullptr, stats);
      fill_nan(block, kept, stride);
      continue;
    }
    const Trace<C> trace =
        kept ? w.trace.at(kept, s)
             : TraceMemory<C>::lay_out(w.theta0, w.trace.own, s, w.trace.gram, w.trace.weights);
    if (kept) trace.clear_padding(block, s);
    w.task.forward(f, t, trace);
    if (kept && w.trace.own) {
      C* rest = kept + padded(s.N * s.D);
      block.unfenced().each_item(w.trace.elements, [&](int64_t i) { rest[i] = w.trace.own[i]; });
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
  int64_t size;
  C* sums;  // [size], laid out as `grad`
  C* gtheta0;
  Arena<C> of_sums;
  SibParameterGrad<C> grad;

  __host__ __device__ __forceinline__ static int64_t sums_size(const Sizes& s) {
    Arena<C> count;
    SibParameterGrad<C> unused(count, s);
    return count.used();
  }

  __host__ __device__ __forceinline__ SibBackwardLayout(Arena<C>& arena, B& block, const Sizes& s,
                                                        const SibBackward<C>& f, C scale, C bias)
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
__host__ __device__ __forceinline__ void sib_backward_body(void* place, const SibBackward<C>& f,
                                                           int64_t stride, C* partial, Arena<C> arena,
                                                           Share share) {
  const auto& s = as<typename B::Sizes>(f.problem.s);
  auto& [block, w] =
      Frame<B, SibBackwardLayout<B>>::make(place, arena, f.problem.s, f, *f.problem.scale, *f.problem.bias);
  fold(block, f.problem.mlp, f.problem.running, s, w.mlp);
  block.unfenced().each_item(w.size, [&](int64_t i) { w.sums[i] = C(0); });
  const int64_t start_size = f.problem.start.rows * s.D;
  for (int64_t t = share.first; t < s.T; t += share.step) {
    if (w.task.invalid(t)) {
      fill_nan(block, w.sums, w.size);
      fill_nan(block, f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr, s.Q * s.D);
      fill_nan(block, f.grad_start ? f.grad_start + t * start_size : nullptr, start_size);
      continue;
    }
    C* kept = const_cast<C*>(f.trace) + t * stride;
    if (w.trace.own) {
      const C* rest = kept + padded(s.N * s.D);
      block.unfenced().each_item(w.trace.elements, [&](int64_t i) { w.trace.own[i] = rest[i]; });
    }
    w.task.backward(f, t, w.trace.at(kept, s), w.adjoint, w.grad, w.gtheta0);
  }
  block.unfenced().each_item(w.size, [&](int64_t i) { partial[i] = w.sums[i]; });
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

  __host__ __device__ __forceinline__ static int64_t sums_size(const Sizes& s) {
    Arena<C> count;
    FoldedMlpGrad<C> unused(count, s);
    return count.used();
  }

  __host__ __device__ __forceinline__ MlpLayout(Arena<C>& arena, B& block, const Sizes& s,
                                                const MlpProblem<C>& p, bool backward)
      : mlp(arena, s, p.running != nullptr),
        task(arena, block, s, mlp, backward),
        size(sums_size(s)),
        sums(backward ? arena.take(size) : nullptr),
        of_sums(sums),
        grad(of_sums, s) {}
};

template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void mlp_forward_body(void* place, const MlpProblem<C>& p, C* out,
                                                          Arena<C> arena, Share share) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = Frame<B, MlpLayout<B>>::make(place, arena, p.s, p, false);
  fold(block, p.mlp, p.running, s, w.mlp);
  for (int64_t t = share.first; t < s.T; t += share.step) {
    w.task.forward(p.logits + t * s.Q * s.N, out + t * s.Q * s.N);
  }
}

template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void mlp_backward_body(void* place, const MlpProblem<C>& p,
                                                           const C* grad_out, C* grad_logits, C* partial,
                                                           Arena<C> arena, Share share) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = Frame<B, MlpLayout<B>>::make(place, arena, p.s, p, true);
  fold(block, p.mlp, p.running, s, w.mlp);
  block.each_item(w.size, [&](int64_t i) { w.sums[i] = C(0); });
  for (int64_t t = share.first; t < s.T; t += share.step) {
    const int64_t at = t * s.Q * s.N;
    w.task.backward(p.logits + at, grad_out + at, grad_logits + at, w.grad);
  }
  block.each_item(w.size, [&](int64_t i) { partial[i] = w.sums[i]; });
}

template <class B>
struct ClassMeansLayout {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  SortedClasses<B> classes;
  C* inverse;
  C* sum;  // [D], gradient of the weight; with a backward pass only

  __host__ __device__ __forceinline__ ClassMeansLayout(Arena<C>& arena, B&, const Sizes& s, bool backward)
      : classes(arena, s, true), inverse(arena.take(s.S)), sum(backward ? arena.take(s.D) : nullptr) {}

  __host__ __device__ __forceinline__ ClassMeans<B> task(B& block, const Sizes& s,
                                                         const ClassMeansProblem<C>& p, int64_t t) const {
    return {block,    s,      B::task_rows(p.support, t, s.D, nullptr), classes.of(block, p.classes, t, s),
            p.weight, inverse};
  }
};

template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void class_means_forward_body(void* place, const ClassMeansProblem<C>& p,
                                                                  C* theta0, Arena<C> arena, Share share) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = Frame<B, ClassMeansLayout<B>>::make(place, arena, p.s, false);
  for (int64_t t = share.first; t < s.T; t += share.step) {
    C* to = theta0 + t * s.N * s.D;
    if (is_invalid(block, t, s, p.classes.labels, p.support, nullptr)) {
      fill_nan(block, to, s.N * s.D);
      continue;
    }
    w.task(block, s, p, t).forward(to);
  }
}

// partial [D]: the block's own sum over its tasks; written only where there is a weight.
template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void class_means_backward_body(void* place, const ClassMeansProblem<C>& p,
                                                                   const C* grad_theta0, C* grad_support,
                                                                   C* partial, Arena<C> arena, Share share) {
  const auto& s = as<typename B::Sizes>(p.s);
  auto& [block, w] = Frame<B, ClassMeansLayout<B>>::make(place, arena, p.s, true);
  C* sum = p.weight ? w.sum : nullptr;
  block.each_item(s.D, [&](int64_t d) { w.sum[d] = C(0); });
  for (int64_t t = share.first; t < s.T; t += share.step) {
    C* to = grad_support ? grad_support + t * s.S * s.D : nullptr;
    if (is_invalid(block, t, s, p.classes.labels, p.support, nullptr)) {
      fill_nan(block, to, s.S * s.D);
      fill_nan(block, w.sum, s.D);
      continue;
    }
    w.task(block, s, p, t).backward(grad_theta0 + t * s.N * s.D, to, sum);
  }
  if (sum) block.each_item(s.D, [&](int64_t d) { partial[d] = sum[d]; });
}

// out[i] = factor * sum_b partials[b][i], in an order that depends on `count` alone. A block takes kLanes
// neighbouring i, its warps every kWarps-th partial.
template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void sum_partials_body(const C* partials, int64_t count, int64_t size,
                                                           C factor, C* out, Share share) {
  constexpr int kLanes = B::kLanes, kWarps = B::kWarps;
  const B block;
  C* const stage = B::stage();
  for (int64_t base = share.first * kLanes; base < size; base += share.step * kLanes) {
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
      if (base + i < size) out[base + i] = factor * sum;
    });
  }
}

// Where the gradients of the parameters go. scale, bias, weight: null, or what lies behind the MLP's in a
// SibParameterGrad.
template <class C>
struct ParameterGradients {
  MlpArrays<C> mlp;
  C *scale, *bias, *weight;
};

// sums: a SibParameterGrad, or a FoldedMlpGrad where there are no others.
template <class B, class C = typename B::Scalar>
__host__ __device__ __forceinline__ void unfold_body(const Sizes& sizes, const MlpArrays<const C>& mlp,
                                                     C* sums, const ParameterGradients<C>& to) {
  B block;
  const auto& s = as<typename B::Sizes>(sizes);
  Arena<C> arena(sums);
  const SibParameterGrad<C> from(arena, s);
  unfold(block, mlp, from.mlp, s, to.mlp);
  if (!to.scale) return;
  block.each_item(s.D + 1, [&](int64_t i) {
    if (i == s.D) {
      *to.scale = *from.scale;
      *to.bias = *from.bias;
    } else if (to.weight) {
      to.weight[i] = from.weight[i];
    }
  });
}

}  // namespace kernelmeta
