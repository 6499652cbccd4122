// One task of `program`, from its features to its logits and back.
#pragma once

#include "engine/program_direct.h"
#include "engine/program_features.h"
#include "engine/sib_task.h"
#include "engine/task_rows.h"

namespace kernelmeta {

// kLearned: one for all tasks; kGiven: each task has its own.
enum class Start : int64_t { kClassMeans = 0, kLearned = 1, kZero = 2, kGiven = 3 };

template <class C>
struct ProgramProblem {
  int64_t T, N, D, H;  // N: of the task that has most
  int64_t n_phases, K;
  bool cosine, euclidean, coefficients, first_order;
  bool dot;    // linear, and without a bias
  bool pairs;  // as in ProgramShape
  TaskRows support, query;
  TaskClasses classes;
  Start start;
  const C* theta0;                 // [N][D] of a learned start, [T][N][D] of a given one
  const C* start_bias;             // [N] or null; linear
  const C* weight;                 // [D] or null; class means
  const C *scale, *bias, *target;  // one value each, or null: 1, 0, 1
  const C* rates;                  // [K]
  const C* proportions;            // [T][bags][N], what the classes are known to have; or null
  const int64_t* bag_offsets;      // [T][bags + 1], of a task's query rows; null: one bag
  int64_t bags = 1;

  // Whether every class needs a support row: not where the start does not come from them.
  KERNELMETA_INLINE bool every_class() const { return start != Start::kGiven; }
  KERNELMETA_INLINE const C* start_of(int64_t t) const {
    return start == Start::kGiven ? theta0 + t * N * D : theta0;
  }
  // The MLP's, whatever the rows; of nothing where there is none.
  KERNELMETA_INLINE Sizes mlp_sizes() const {
    if (!H) return {1, 1, 1, 0, D, 0, K};
    return pairs ? pair_sizes(1, 1, D, H, K) : Sizes{1, 1, 1, N, D, H, K};
  }
  KERNELMETA_INLINE ProgramShape shape(int64_t t, const Phase* phases) const {
    ProgramShape s{support.count(t),
                   query.count(t),
                   classes.count(t, N),
                   D,
                   H,
                   phases,
                   n_phases,
                   K,
                   cosine,
                   euclidean,
                   false,
                   false,
                   coefficients,
                   pairs,
                   false,
                   false};
    for (int64_t i = 0; i < n_phases; ++i) {
      const Phase& phase = phases[i];
      if (phase.steps == 0 && !phase.joins) continue;
      if (phase.shares != Shares::kNone || phase.is_entropy()) s.means = true;
      if (phase.joins || phase.weight != 1) s.joint = true;
      (phase.query ? s.uses_query : s.uses_support) = true;
    }
    return s;
  }
};

template <class C>
struct ProgramForward {
  ProgramProblem<C> problem;
  C* logits;                                     // [sum Q][N]
  C *support_coefficients, *query_coefficients;  // [sum S][N], [sum Q][N] or null
  C* start_coefficients;                         // [T][N] or null
  C* trace;                                      // or null
};

// Sums over tasks.
template <class C>
struct ProgramGrad {
  C *theta0, *start_bias;  // [N][D], [N]; learned start
  C* weight;               // [D]
  C *scale, *bias, *target;
  C* rates;
  FoldedMlpGrad<C> mlp;

  KERNELMETA_INLINE ProgramGrad(Arena<C>& arena, const ProgramProblem<C>& p)
      : theta0(arena.take(p.start == Start::kLearned ? p.N * p.D : 0)),
        start_bias(arena.take(p.N)),
        weight(arena.take(p.weight ? p.D : 0)),
        scale(arena.take(1)),
        bias(arena.take(1)),
        target(arena.take(1)),
        rates(arena.take(p.K)),
        mlp(arena, p.mlp_sizes()) {}
};

template <class C>
struct ProgramBackward {
  ProgramProblem<C> problem;
  const C* trace;
  const C* grad_logits;
  const C *grad_support_coefficients, *grad_query_coefficients;  // all three or none
  const C* grad_start_coefficients;
  C *grad_support, *grad_query;  // [sum S][D], [sum Q][D] or null
  C* grad_start;                 // [T][N][D]; given start
  C* grad_proportions;           // [T][bags][N] or null
};

// Elements that the trace of a task takes.
template <class C>
KERNELMETA_INLINE int64_t program_trace_size(const ProgramProblem<C>& p, const ProgramShape& s) {
  Arena<C> count;
  ProgramTrace<C> unused(count, s, p.start == Start::kClassMeans);
  return count.used();
}

// What forward and backward both need to work on one task. It stays where it is: its parts point at each
// other. The trace must be there, full of zeros at the start of the forward pass, when they are called.
template <class B>
struct ProgramTask {
  using C = typename B::Scalar;
  using F = typename B::Feature;

  B& block;
  const ProgramProblem<C>& p;
  const int64_t t;
  const ProgramShape shape;
  const Sizes sizes;
  C *support_buffer, *query_buffer;
  C *support_inverse, *class_sizes, *y, *w1;
  const C* whole_w1;  // of the task that has most ways
  TaskMembers<B> members;
  FoldedMlp<C> mlp;
  ProgramParameters<C> parameters;
  ProgramLoop<B> loop;
  ProgramTrace<C> trace;
  ProgramFeatures<B> features;
  DirectProgram<B> direct;

  KERNELMETA_INLINE ProgramTask(Arena<C>& arena, B& block, const ProgramProblem<C>& p, const Phase* phases,
                                const FoldedMlp<C>& folded, int64_t t)
      : block(block),
        p(p),
        t(t),
        shape(p.shape(t, phases)),
        sizes{1, shape.S, shape.Q, shape.N, shape.D, shape.H, shape.K},
        support_buffer(B::widening_buffer(arena, p.support.of(t), p.D)),
        query_buffer(B::widening_buffer(arena, p.query.of(t), p.D)),
        support_inverse(arena.take(shape.S)),
        class_sizes(arena.take(shape.N)),
        y(arena.take(shape.N * padded(shape.S))),
        w1(p.H && !p.pairs && shape.N < p.N ? arena.take(p.H * shape.N) : nullptr),
        whole_w1(folded.w1),
        members(arena, p.classes, t, p.support.first(t), shape.S, shape.N, p.N),
        mlp(folded),
        parameters{p.scale ? *p.scale : C(1),
                   p.bias ? *p.bias : C(0),
                   p.target ? *p.target : C(1),
                   p.rates,
                   &mlp,
                   y,
                   class_sizes,
                   p.first_order,
                   p.proportions ? p.proportions + t * p.bags * p.N : nullptr,
                   p.N,
                   p.bags,
                   p.bag_offsets ? p.bag_offsets + t * (p.bags + 1) : nullptr},
        loop(block, shape, parameters, arena),
        trace(),
        features{block, shape, {}, {}, trace, nullptr, p.start_bias, p.first_order, p.dot},
        direct(arena, loop, trace) {
    if (w1) mlp.w1 = w1;
  }
  ProgramTask(const ProgramTask&) = delete;

  // The trace lies at `base`; the rows are looked at.
  KERNELMETA_INLINE void bind(C* base) {
    Arena<C> arena(base);
    trace = ProgramTrace<C>(arena, shape, p.start == Start::kClassMeans);
    features.support_rows = B::task_rows(p.support.of(t), 0, p.D, support_buffer);
    features.query_rows = B::task_rows(p.query.of(t), 0, p.D, query_buffer);
    features.theta0 = p.start == Start::kClassMeans ? trace.theta0 : p.start_of(t);
  }

  __host__ __device__ KERNELMETA_NOINLINE void forward(const ProgramForward<C>& f) {
    prepare();
    if (p.start == Start::kClassMeans) class_means().forward(trace.theta0);
    const bool in_range = features.forward();
    loop.forward(trace);
    if (!in_range || (p.cosine && p.D == 1) || loop.lost(trace)) forward_anew();
    const int64_t first = p.query.first(t), N = shape.N, ld = shape.ld();
    loop.logits(trace, p.N, f.logits + first * p.N);
    if (!p.coefficients) return;
    const C* last = trace.p + shape.K * N * ld;
    rows_out(block, last + shape.support().first, ld, shape.uses_support ? N : 0, shape.S, p.N,
             f.support_coefficients + p.support.first(t) * p.N);
    rows_out(block, last + shape.query().first, ld, N, shape.Q, p.N, f.query_coefficients + first * p.N);
    block.unfenced().each_item(p.N, [&](int64_t n) {
      f.start_coefficients[t * p.N + n] = n >= N ? C(0) : trace.a ? trace.a[shape.K * N + n] : C(1);
    });
  }

  // gtheta0 [N][D]: scratch where the start is the class means. Adds to `grad`.
  __host__ __device__ KERNELMETA_NOINLINE void backward(const ProgramBackward<C>& f,
                                                        const ProgramGrad<C>& grad,
                                                        const typename ProgramLoop<B>::Adjoint& adjoint,
                                                        const typename ProgramFeatures<B>::Scratch& scratch,
                                                        C* gtheta0) {
    const bool from_means = p.start == Start::kClassMeans;
    const int64_t support_first = p.support.first(t), query_first = p.query.first(t), D = p.D;
    prepare();
    if (p.coefficients) coefficients_backward(f, adjoint);
    C* of_shares = f.grad_proportions ? f.grad_proportions + t * p.bags * p.N : nullptr;
    if (of_shares) block.unfenced().features_zero(p.bags, p.N, of_shares);
    const ProgramLoopGrad<C> of_loop{grad.scale, grad.bias, grad.target, grad.rates, &grad.mlp, of_shares};
    const C* grad_logits = f.grad_logits + query_first * p.N;
    C* gsupport = f.grad_support ? f.grad_support + support_first * D : nullptr;
    C* gquery = f.grad_query ? f.grad_query + query_first * D : nullptr;
    C* gstart = from_means ? gtheta0 : p.start == Start::kLearned ? grad.theta0 : nullptr;
    if (p.start == Start::kGiven) {
      gstart = f.grad_start + t * p.N * D;
      block.unfenced().features_zero(p.N, D, gstart);
    }
    if (loop.lost(trace)) return backward_anew(grad_logits, grad, of_loop, adjoint, gsupport, gquery, gstart);
    loop.backward(trace, grad_logits, p.N, adjoint, of_loop);
    if (from_means) block.unfenced().features_zero(shape.N, D, gstart);
    if (gsupport && !from_means) block.unfenced().features_zero(shape.S, D, gsupport);
    if (gquery) block.unfenced().features_zero(shape.Q, D, gquery);
    features.start_backward(adjoint, scratch, gstart, shape.has_length<B>() ? nullptr : grad.start_bias);
    if (from_means) class_means().backward(gstart, gsupport, p.weight ? grad.weight : nullptr);
    if (gsupport || gquery) features.rows_backward(adjoint, scratch, gsupport, gquery);
  }

 private:
  // ---- in D dimensions, where the space of the rows lost too much

  // theta at the start and the normalised rows.
  KERNELMETA_INLINE void start_anew() {
    const C* inverse = trace.inverse;
    if (shape.uses_support) {
      normalise_rows(block, features.support_rows, shape.S, p.D, inverse, direct.unit_support);
    }
    normalise_rows(block, features.query_rows, shape.Q, p.D, inverse + shape.query().first,
                   direct.unit_query);
    block.unfenced().features(shape.N, p.D, [&](int64_t n, auto row) {
      const C* from = features.theta0 + n * p.D;
      row.each([&](auto d) { d.store(direct.theta + n * p.D, d.load(from)); });
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void forward_anew() {
    block.unfenced().features(shape.N, 1, [&](int64_t n, auto row) { row.one([&] { trace.lost[n] = 1; }); });
    features.norms();
    start_anew();
    direct.forward(false);
  }

  __host__ __device__ KERNELMETA_NOINLINE void backward_anew(const C* grad_logits, const ProgramGrad<C>& grad,
                                                             const ProgramLoopGrad<C>& of_loop,
                                                             const typename ProgramLoop<B>::Adjoint& adjoint,
                                                             C* gsupport, C* gquery, C* gstart) {
    const bool from_means = p.start == Start::kClassMeans;
    const int64_t N = shape.N, D = p.D;
    if (gsupport) block.unfenced().features_zero(shape.S, D, gsupport);
    if (gquery) block.unfenced().features_zero(shape.Q, D, gquery);
    start_anew();
    direct.forward(true);
    direct.backward(grad_logits, p.N, adjoint, of_loop, {gsupport, gquery});
    const C* inverse = trace.inverse;
    if (gsupport && shape.uses_support) {
      through_norms(block, direct.unit_support, inverse, shape.S, D, gsupport);
    }
    if (gquery) through_norms(block, direct.unit_query, inverse + shape.query().first, shape.Q, D, gquery);
    if (from_means) {
      class_means().backward(adjoint.gtheta, gsupport, p.weight ? grad.weight : nullptr, true);
    } else {
      block.features(N, D, [&](int64_t n, auto row) {
        C* to = gstart + n * D;
        row.each([&](auto d) { d.store(to, d.load(to) + d.load(adjoint.gtheta + n * D)); });
      });
    }
  }

  // Labels, and of the MLP's first layer what this task's classes need.
  KERNELMETA_INLINE void prepare() {
    const int64_t N = shape.N, H = p.H;
    members.sort(block, shape.S, N);
    block.features_zero(1, N * padded(shape.S), y);
    if (w1) {
      const C* all = whole_w1;
      block.unfenced().each_item(H * N, [&](int64_t i) { w1[i] = all[i / N * p.N + i % N]; });
    }
    one_hot(block, members.members, shape.S, N, y, class_sizes);
  }

  KERNELMETA_INLINE ClassMeans<B> class_means() {
    return {block, sizes, features.support_rows, members.members, p.weight, support_inverse};
  }

  // Gradients of the coefficients -> of P_K and a_K.
  KERNELMETA_INLINE void coefficients_backward(const ProgramBackward<C>& f,
                                               const typename ProgramLoop<B>::Adjoint& adjoint) {
    const int64_t N = shape.N, ld = shape.ld();
    const RowRange support = shape.support(), query = shape.query();
    const bool given = f.grad_start_coefficients != nullptr;
    const C* of_support = given ? f.grad_support_coefficients + p.support.first(t) * p.N : nullptr;
    const C* of_query = given ? f.grad_query_coefficients + p.query.first(t) * p.N : nullptr;
    block.unfenced().each_item(ld, [&](int64_t i) {
      const int64_t of_part = i < query.first ? i : i - query.first;
      const C* from = i < query.first ? of_support : of_query;
      const bool there = given && of_part < (i < query.first ? support.count : query.count);
      for (int64_t n = 0; n < N; ++n) adjoint.gp[n * ld + i] = there ? from[of_part * p.N + n] : C(0);
    });
    block.unfenced().each_item(
        N, [&](int64_t n) { adjoint.ga[n] = given ? f.grad_start_coefficients[t * p.N + n] : C(0); });
  }
};

}  // namespace kernelmeta
