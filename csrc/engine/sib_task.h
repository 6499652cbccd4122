// One task of `sib`, from its features to its logits and back.
#pragma once

#include "engine/problem.h"

namespace kernelmeta {

// Whether a task's labels and indices cannot be used: a label outside of 0..N-1, a class without a row where
// every class needs one, an index outside of its bank. Blocks that cannot raise an error ask for each task;
// its barrier also parts the task from what is left to do of the one before.
template <class B>
__host__ __device__ __forceinline__ bool is_invalid(B& block, int64_t t, const typename B::Sizes& s,
                                                    const int64_t* labels, bool every_class,
                                                    const Features& start, const Features* query) {
  const int64_t S = s.S, N = s.N, Q = query && query->index ? s.Q : 0;
  const int64_t* label = labels ? labels + t * S : nullptr;
  return block.any(2 * S + N + Q, [&](int64_t i) {
    if (i < S) return label && (label[i] < 0 || label[i] >= N);
    i -= S;
    if (i < N) {
      if (!label || !every_class) return false;
      for (int64_t j = 0; j < S; ++j) {
        if (label[j] == i) return false;
      }
      return true;
    }
    i -= N;
    if (i < S) {
      if (!start.index) return false;
      const int64_t row = start.index[t * S + i];
      return row < 0 || row >= start.bank;
    }
    const int64_t row = query->index[t * Q + i - S];
    return row < 0 || row >= query->bank;
  });
}

// Valid labels [S] -> ClassMembers.
template <class B>
__host__ __device__ __forceinline__ void sort_by_class(B& block, const int64_t* label, int64_t S, int64_t N,
                                                       int32_t* members, int32_t* offsets) {
  block.unfenced().each_item(S + N + 1, [&](int64_t i) {
    int32_t before = 0;
    if (i < S) {
      for (int64_t j = 0; j < S; ++j) before += label[j] < label[i] || (label[j] == label[i] && j < i);
      members[before] = int32_t(i);
    } else {
      for (int64_t j = 0; j < S; ++j) before += label[j] < i - S;
      offsets[i - S] = before;
    }
  });
}

// The support rows' classes in memory of the task, where they come as labels.
template <class B>
struct SortedClasses {
  using C = typename B::Scalar;
  int32_t *members, *offsets;

  __host__ __device__ __forceinline__ SortedClasses(Arena<C>& arena, const typename B::Sizes& s, bool labels)
      : members(labels ? reinterpret_cast<int32_t*>(arena.take(s.S)) : nullptr),
        offsets(labels ? reinterpret_cast<int32_t*>(arena.take(s.N + 1)) : nullptr) {}

  __host__ __device__ __forceinline__ ClassMembers of(B& block, const ClassTable& table, int64_t t,
                                                      const typename B::Sizes& s) const {
    if (!table.labels) return {table.members + t * s.S, table.offsets + t * (s.N + 1)};
    sort_by_class(block, table.labels + t * s.S, s.S, s.N, members, offsets);
    return {members, offsets};
  }
};

template <class B>
__host__ __device__ __forceinline__ void fill_nan(B& block, typename B::Scalar* out, int64_t n) {
  if (out) block.each_item(n, [&](int64_t i) { out[i] = typename B::Scalar(__builtin_nan("")); });
}

// What forward and backward both need to work on one task. kKeeps: see InnerLoop.
template <class B, bool kKeeps = false>
struct SibTask {
  using C = typename B::Scalar;
  using Sizes = typename B::Sizes;

  B& block;
  const Sizes& s;
  const SibProblem<C>& p;
  InnerLoop<B, kKeeps> loop;
  C* support_inverse;
  SortedClasses<B> classes;
  C *query_buffer, *start_buffer;
  C *span, *scaled;

  __host__ __device__ __forceinline__ SibTask(Arena<C>& arena, B& block, const Sizes& s,
                                              const SibProblem<C>& p, const FoldedMlp<C>& mlp, C scale,
                                              C bias, bool gram_formed, bool backward)
      : block(block),
        s(s),
        p(p),
        loop(block, s, mlp, scale, bias, p.lr, backward, arena),
        support_inverse(arena.take(s.S)),
        classes(arena, s, p.classes.labels != nullptr),
        query_buffer(B::widening_buffer(arena, p.query, s.D)),
        start_buffer(B::widening_buffer(arena, p.start, s.D)),
        span(gram_formed ? nullptr : arena.take(s.N * s.D)),
        scaled(gram_formed ? nullptr : arena.take(s.N * s.ld())) {}

  __host__ __device__ __forceinline__ bool invalid(int64_t t) {
    return is_invalid(block, t, s, p.classes.labels, true, p.start, &p.query);
  }

  __host__ __device__ __forceinline__ void forward(const SibForward<C>& f, int64_t t, const Trace<C>& trace) {
    if (p.classes.given()) {
      class_means(t).forward(trace.theta0);
    } else {
      const auto rows = B::theta0_rows(p.start, t, s.D, start_buffer);
      block.features(s.N, s.D, [&](int64_t n, auto row) {
        row.each([&](auto d) { d.store(trace.theta0 + n * s.D, d.load(rows(n))); });
      });
    }
    const auto query = B::task_rows(p.query, t, s.D, query_buffer);
    QueryFeatures<B> features{block, s, query, trace};
    features.forward();
    loop.forward(trace, gram(query, trace), f.stats ? f.stats + t * s.K * 4 * s.H : nullptr);
    loop.logits(trace, f.logits + t * s.Q * s.N);
    if (f.weights) features.weights(f.weights + t * s.N * s.D, loop.z);
  }

  // Scratch of the backward pass.
  struct Adjoint {
    LoopAdjoint<B> loop;
    typename QueryFeatures<B>::Scratch features;

    __host__ __device__ __forceinline__ Adjoint(Arena<C>& arena, const Sizes& s, bool gram_formed,
                                                bool query_grad, bool weights)
        : loop(arena, s, weights), features(arena, s, query_grad && gram_formed) {}
  };

  // Adds to `grad`. gtheta0 [N][D]: scratch, unless the start is theta0 and its gradient wanted.
  __host__ __device__ __forceinline__ void backward(const SibBackward<C>& f, int64_t t, const Trace<C>& trace,
                                                    const Adjoint& adjoint, const SibParameterGrad<C>& grad,
                                                    C* gtheta0) {
    const C* gweights = f.grad_weights ? f.grad_weights + t * s.N * s.D : nullptr;
    const auto query = B::task_rows(p.query, t, s.D, query_buffer);
    QueryFeatures<B> features{block, s, query, trace};
    const GramMatrix<B> a = gram(query, trace);
    if (gweights) features.weights_backward(gweights, adjoint.loop);
    loop.backward(trace, a, f.grad_logits + t * s.Q * s.N, adjoint.loop, grad.mlp);
    block.each_item(2, [&](int64_t which) {
      C* total = which ? grad.bias : grad.scale;
      const C* each = which ? adjoint.loop.gbias : adjoint.loop.gscale;
      for (int64_t n = 0; n < s.N; ++n) *total += each[n];
    });
    const bool from_support = p.classes.given();
    C* gstart = f.grad_start ? f.grad_start + t * p.start.rows * s.D : nullptr;
    if (gstart && !from_support) gtheta0 = gstart;
    if (!gstart && !p.weight && !f.grad_query) return;
    features.theta0_backward(adjoint.loop, gweights, adjoint.features, gtheta0);
    if (from_support) class_means(t).backward(gtheta0, gstart, p.weight ? grad.weight : nullptr);
    if (f.grad_query) {
      features.query_backward(a, adjoint.loop, gweights, adjoint.features, f.grad_query + t * s.Q * s.D);
    }
  }

 private:
  __host__ __device__ __forceinline__ ClassMeans<B> class_means(int64_t t) {
    const ClassMembers members = classes.of(block, p.classes, t, s);
    return {block, s, B::task_rows(p.start, t, s.D, start_buffer), members, p.weight, support_inverse};
  }
  template <class F>
  __host__ __device__ __forceinline__ GramMatrix<B> gram(const Rows<F>& rows, const Trace<C>& trace) {
    return {block, s, rows, trace.inverse, trace.gram, span, scaled};
  }
};

}  // namespace kernelmeta
