// One task of `sib`, from its features to its logits and back.
#pragma once

#include "engine/problem.h"

namespace kernelmeta {

// Whether a task's labels and indices cannot be used: a label outside of 0..N-1, a class without a row where
// every class needs one, an index outside of its bank. Blocks that cannot raise an error ask for each task;
// its barrier also parts the task from what is left to do of the one before.
template <class B>
KERNELMETA_INLINE bool is_invalid(B& block, int64_t t, const typename B::Sizes& s, const int64_t* labels,
                                  bool every_class, const Features& start, const Features* query) {
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
KERNELMETA_INLINE void sort_by_class(B& block, const int64_t* label, int64_t S, int64_t N, int32_t* members,
                                     int32_t* offsets) {
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

  KERNELMETA_INLINE SortedClasses(Arena<C>& arena, const typename B::Sizes& s, bool labels)
      : members(labels ? reinterpret_cast<int32_t*>(arena.take(s.S)) : nullptr),
        offsets(labels ? reinterpret_cast<int32_t*>(arena.take(s.N + 1)) : nullptr) {}

  KERNELMETA_INLINE ClassMembers of(B& block, const ClassTable& table, int64_t t,
                                    const typename B::Sizes& s) const {
    if (!table.labels) return {table.members + t * s.S, table.offsets + t * (s.N + 1)};
    sort_by_class(block, table.labels + t * s.S, s.S, s.N, members, offsets);
    return {members, offsets};
  }
};

// Of results (or null), which nobody reads: without a barrier at its end.
template <class B>
KERNELMETA_INLINE void fill_nan(const B& block, typename B::Scalar* out, int64_t n) {
  if (out) block.unfenced().each_item(n, [&](int64_t i) { out[i] = typename B::Scalar(__builtin_nan("")); });
}
// Of sums over the tasks.
template <class B>
KERNELMETA_INLINE void fill_sums_with_nan(const B& block, typename B::Scalar* sums, int64_t n) {
  block.each_item(n, [&](int64_t i) { sums[i] = typename B::Scalar(__builtin_nan("")); });
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
  // Of a task that is done anew in D dimensions, from normalised rows.
  C *theta, *w;  // [K+1][N][D], [K][N][D]
  C* unit;       // [Q][D]

  KERNELMETA_INLINE SibTask(Arena<C>& arena, B& block, const Sizes& s, const SibProblem<C>& p,
                            const FoldedMlp<C>& mlp, C scale, C bias, bool gram_formed, bool backward)
      : block(block),
        s(s),
        p(p),
        loop(block, s, mlp, scale, bias, p.lr, gram_formed, backward, arena),
        support_inverse(arena.take(s.S)),
        classes(arena, s, p.classes.labels != nullptr),
        query_buffer(B::widening_buffer(arena, p.query, s.D)),
        start_buffer(B::widening_buffer(arena, p.start, s.D)),
        theta(gram_formed ? arena.take_aside((s.K + 1) * s.N * s.D, true) : nullptr),
        w(gram_formed ? arena.take_aside(s.K * s.N * s.D, true) : nullptr),
        unit(gram_formed || s.D == 1 ? arena.take_aside(s.Q * s.D, true) : nullptr) {}

  KERNELMETA_INLINE bool invalid(int64_t t) {
    return is_invalid(block, t, s, p.classes.labels, true, p.start, &p.query);
  }

  __host__ __device__ KERNELMETA_NOINLINE void forward(const SibForward<C>& f, int64_t t,
                                                       const Trace<C>& trace) {
    if (p.classes.given()) {
      class_means(t).forward(trace.theta);
    } else {
      const auto rows = B::theta0_rows(p.start, t, s.D, start_buffer);
      block.feature_entries(s.N, s.D,
                            [&](int64_t n, auto d) { d.store(trace.theta + n * s.D, d.load(rows(n))); });
    }
    const auto query = B::task_rows(p.query, t, s.D, query_buffer);
    C* stats = f.stats ? f.stats + t * s.K * 4 * s.H : nullptr;
    QueryFeatures<B> features{block, s, query, trace};
    if (trace.gram) {
      const bool in_range = features.forward();
      loop.forward(trace, stats);
      if (!in_range || s.D == 1 || loop.lost(trace)) return forward_anew(f, t, trace, query, stats);
    } else {
      features.norms();
      if (s.D == 1) return forward_anew(f, t, trace, query, stats);
      loop.direct_forward(trace, query, trace.inverse, stats);
    }
    finish(f, t, features);
  }

  // Scratch of the backward pass.
  struct Adjoint {
    LoopAdjoint<B> loop;
    typename QueryFeatures<B>::Scratch features;

    KERNELMETA_INLINE Adjoint(Arena<C>& arena, const Sizes& s, bool gram_formed, bool query_grad,
                              bool weights)
        : loop(arena, s, gram_formed, weights), features(arena, s, query_grad && gram_formed) {}
  };

  // Adds to `grad`. gtheta0 [N][D]: scratch, unless the start is theta0 and its gradient wanted.
  __host__ __device__ KERNELMETA_NOINLINE void backward(const SibBackward<C>& f, int64_t t,
                                                        const Trace<C>& trace, const Adjoint& adjoint,
                                                        const SibParameterGrad<C>& grad, C* gtheta0) {
    const C* gweights = f.grad_weights ? f.grad_weights + t * s.N * s.D : nullptr;
    const auto query = B::task_rows(p.query, t, s.D, query_buffer);
    C* gquery = f.grad_query ? f.grad_query + t * s.Q * s.D : nullptr;
    const bool from_support = p.classes.given();
    C* gstart = f.grad_start ? f.grad_start + t * p.start.rows * s.D : nullptr;
    if (gstart && !from_support) gtheta0 = gstart;
    QueryFeatures<B> features{block, s, query, trace};
    if (s.D == 1 || loop.lost(trace)) {
      backward_anew(f, t, trace, query, adjoint, grad, gtheta0, gquery);
    } else if (!trace.gram) {
      begin_direct_backward(gweights, gtheta0, gquery);
      loop.direct_backward(trace, query, trace.inverse, f.grad_logits + t * s.Q * s.N, adjoint.loop, grad.mlp,
                           gtheta0, gquery);
      if (gquery) features.without_radial_part(gquery);
    } else {
      if (gweights) features.weights_backward(gweights, adjoint.loop);
      loop.backward(trace, f.grad_logits + t * s.Q * s.N, adjoint.loop, grad.mlp);
      if (gstart || p.weight || gquery) {
        features.theta0_backward(adjoint.loop, gweights, adjoint.features, gtheta0);
      }
      if (gquery) features.query_backward(adjoint.loop, gweights, adjoint.features, gquery);
    }
    block.each_item(2, [&](int64_t which) {
      *(which ? grad.bias : grad.scale) += (which ? adjoint.loop.gbias : adjoint.loop.gscale).total();
    });
    if (from_support && (gstart || p.weight)) {
      class_means(t).backward(gtheta0, gstart, p.weight ? grad.weight : nullptr);
    }
  }

 private:
  KERNELMETA_INLINE void finish(const SibForward<C>& f, int64_t t, QueryFeatures<B>& features) {
    loop.logits(features.trace, f.logits + t * s.Q * s.N);
    if (f.weights) features.weights(f.weights + t * s.N * s.D, loop.z);
  }

  // ---- in D dimensions, where the space of the rows lost too much

  // The trace, theta at the start and the normalised rows.
  template <class F>
  KERNELMETA_INLINE Trace<C> anew(const Trace<C>& trace, const FeatureRows<F>& query) {
    normalise_rows(block, query, s.Q, s.D, trace.inverse, unit);
    if (!trace.gram) return trace;
    block.feature_entries(
        s.N, s.D, [&](int64_t n, auto d) { d.store(theta + n * s.D, d.load(trace.theta + n * s.D)); });
    return trace.in_features(theta, w);
  }

  template <class F>
  __host__ __device__ KERNELMETA_NOINLINE void forward_anew(const SibForward<C>& f, int64_t t,
                                                            const Trace<C>& trace,
                                                            const FeatureRows<F>& query, C* stats) {
    QueryFeatures<B>{block, s, query, trace}.norms();
    if (trace.lost) block.unfenced().each_item(s.N, [&](int64_t n) { trace.lost[n] = 1; });
    const Trace<C> direct = anew(trace, query);
    loop.direct_forward(direct, FeatureRows<C>{unit, s.D, nullptr}, nullptr, stats);
    QueryFeatures<B> features{block, s, query, direct};
    finish(f, t, features);
  }

  template <class F>
  __host__ __device__ KERNELMETA_NOINLINE void backward_anew(
      const SibBackward<C>& f, int64_t t, const Trace<C>& trace, const FeatureRows<F>& query,
      const Adjoint& adjoint, const SibParameterGrad<C>& grad, C* gtheta0, C* gquery) {
    const Trace<C> direct = anew(trace, query);
    const FeatureRows<C> rows{unit, s.D, nullptr};
    if (!kKeeps && trace.gram) loop.direct_forward(direct, rows, nullptr, nullptr, true);
    begin_direct_backward(f.grad_weights ? f.grad_weights + t * s.N * s.D : nullptr, gtheta0, gquery);
    loop.direct_backward(direct, rows, nullptr, f.grad_logits + t * s.Q * s.N, adjoint.loop, grad.mlp,
                         gtheta0, gquery);
    if (gquery) through_norms(block, unit, trace.inverse, s.Q, s.D, gquery);
  }

  KERNELMETA_INLINE void begin_direct_backward(const C* gweights, C* gtheta0, C* gquery) {
    if (gquery) block.unfenced().features_zero(s.Q, s.D, gquery);
    block.unfenced().features(s.N, s.D, [&](int64_t n, auto row) {
      row.each([&](auto d) { d.store(gtheta0 + n * s.D, gweights ? d.load(gweights + n * s.D) : d.zero()); });
    });
  }

  KERNELMETA_INLINE ClassMeans<B> class_means(int64_t t) {
    const ClassMembers members = classes.of(block, p.classes, t, s);
    return {block, s, B::task_rows(p.start, t, s.D, start_buffer), members, p.weight, support_inverse};
  }
};

}  // namespace kernelmeta
