// The inner loop of one task, and its adjoint.
//
// In the space of the rows (the dual form) the state is U [N][ld], the cosines of every query row with every
// class, and r2 [N], the classes' squared norms; cosine_step.h says what a step does to it, with
// G = MLP(s (U + b)). In D dimensions it is theta itself (direct_step.h): where the rows are so many that
// their Gram matrix is not worth forming, and where a step in the space of the rows loses digits.
#pragma once

#include "engine/class_sums.h"
#include "engine/cosine_step.h"
#include "engine/direct_step.h"
#include "engine/mlp.h"

namespace kernelmeta {

// Whether A is worth forming. Per task, in multiplications: A itself takes Q^2 D / 2, once; without it every
// step takes 2 Q N D forward, and as much again backward (and both routes to the gradient of the rows keep
// that proportion). So A pays unless the query rows are many and the steps few.
template <class S>
KERNELMETA_INLINE bool forms_gram(const S& s, bool backward_follows) {
  return s.K > 0 && (backward_follows ? 8 : 4) * s.K * s.N >= s.Q;
}

// What the forward pass leaves for the backward pass, one task; its size stands in kernelmeta/ops/sib_op.py
// too.
template <class C>
struct Trace {
  C* theta;    // [N][D] at the start; in D dimensions [K+1][N][D]
  C* w;        // [K][N][D]    in D dimensions only: see DirectSteps
  C* inverse;  // [Q]          1 / |x_q|
  C* r2;       // [K+1][N]
  C* u;        // [K+1][N][ld]
  C* gram;     // [Q][ld]      A; null: in D dimensions
  C* ag;       // [K][N][ld]   A G, with A only
  C* lost;     // [N]          with A only; not zero: the task was done anew in D dimensions
  C* a;        // [K+1][N]     with A and weights only
  C* p;        // [K+1][N][ld] likewise

  Trace() = default;
  // theta and w come first, so that the rest is one stretch of memory where both arenas are the same.
  template <class S>
  KERNELMETA_INLINE Trace(Arena<C>& features, Arena<C>& arena, const S& s, bool gram_formed, bool weights)
      : theta(features.take((gram_formed ? 1 : s.K + 1) * s.N * s.D)),
        w(gram_formed ? nullptr : features.take(s.K * s.N * s.D)),
        inverse(arena.take(s.Q)),
        r2(arena.take((s.K + 1) * s.N)),
        u(arena.take((s.K + 1) * s.N * s.ld())),
        gram(gram_formed ? arena.take(s.Q * s.ld()) : nullptr),
        ag(gram_formed ? arena.take(s.K * s.N * s.ld()) : nullptr),
        lost(gram_formed ? arena.take(s.N) : nullptr),
        a(gram_formed && weights ? arena.take((s.K + 1) * s.N) : nullptr),
        p(gram_formed && weights ? arena.take((s.K + 1) * s.N * s.ld()) : nullptr) {}

  // The same task done anew in D dimensions: U and r2 take the place of what was lost.
  KERNELMETA_INLINE Trace in_features(C* theta_of_steps, C* w_of_steps) const {
    Trace direct = *this;
    direct.theta = theta_of_steps;
    direct.w = w_of_steps;
    direct.gram = direct.ag = direct.a = direct.p = nullptr;
    return direct;
  }

  // The trace is handed out: nothing in it may depend on what the memory held before.
  template <class B>
  KERNELMETA_INLINE void clear_padding(B& block, const typename B::Sizes& s) const {
    const int64_t KN = s.K * s.N, N = s.N, of_theta = gram ? N : KN + N;
    block.unfenced().each_item(6 + 2 * (KN + N) + KN + s.Q, [&](int64_t i) {
      const auto row = [&i](C* array, int64_t n, int64_t length) {
        if (i < n) {
          for (int64_t j = length; array && j < padded(length); ++j) array[i * padded(length) + j] = 0;
        }
        i -= n;
        return i < 0;
      };
      (void)(row(theta, 1, of_theta * s.D) || row(w, 1, KN * s.D) || row(inverse, 1, s.Q) ||
             row(r2, 1, KN + N) || row(u, KN + N, s.Q) || row(gram, s.Q, s.Q) || row(ag, KN, s.Q) ||
             row(lost, 1, N) || row(a, 1, KN + N) || row(p, KN + N, s.Q));
    });
  }
};

// Scratch of the backward pass of an inner loop; what only one form uses is not there where the other is
// sure.
template <class B>
struct LoopAdjoint {
  using C = typename B::Scalar;

  C* gu;       // [N][ld]   gradient of U, in: of U_K, out: of U_0
  C* gr2;      // [N]       gradient of r2, likewise
  C *gp, *ga;  // [N][ld], [N]: of P and a, with A and weights only
  C *gg, *gz;  // [N][ld]
  C* gag;      // [K][N][ld] gradient of AG; all steps are kept for the Gram matrix' gradient
  C* gs;       // [K][N][ld] G of every step, likewise; in D dimensions of one
  C* g2;       // [H][ld]: of the MLP
  ClassSums<C> gscale, gbias;
  C* gv;        // [N][D], in D dimensions
  C *dot, *ge;  // [N] each, likewise

  KERNELMETA_INLINE LoopAdjoint(Arena<C>& arena, const typename B::Sizes& s, bool gram_formed, bool weights)
      : gu(arena.take(s.N * s.ld())),
        gr2(arena.take(s.N)),
        gp(gram_formed && weights ? arena.take(s.N * s.ld()) : nullptr),
        ga(gram_formed && weights ? arena.take(s.N) : nullptr),
        gg(arena.take(s.N * s.ld())),
        gz(arena.take(s.N * s.ld())),
        gag(gram_formed ? arena.take(s.K * s.N * s.ld()) : nullptr),
        gs(arena.take((gram_formed ? s.K : 1) * s.N * s.ld())),
        g2(arena.take(s.H * s.ld())),
        gscale(arena, s.N),
        gbias(arena, s.N),
        gv(arena.take_aside(s.N * s.D, gram_formed)),
        dot(arena.take_aside(s.N, gram_formed)),
        ge(arena.take_aside(s.N, gram_formed)) {}
};

// kKeeps: a task's backward pass follows its forward pass at once, and finds the activations and G of every
// step where that left them. Otherwise it computes them anew, from U.
template <class B, bool kKeeps = false>
struct InnerLoop {
  using C = typename B::Scalar;
  using Adjoint = LoopAdjoint<B>;

  B& block;
  const typename B::Sizes& s;
  C scale, bias, lr;
  C e;  // step size for U, whose gradient is s times that of Z
  Mlp<B> mlp;
  C* kept;        // [K][kept_size]: activations of every step
  C *z, *g;       // [N][ld], [N][ld]; of g one for every step that is kept
  C* errors;      // [N][2], in the space of the rows: see `loses`
  C *scaled, *h;  // [N][ld], [N][D], in D dimensions

  KERNELMETA_INLINE InnerLoop(B& block, const typename B::Sizes& s, const FoldedMlp<C>& weights, C scale,
                              C bias, C lr, bool gram_formed, bool backward, Arena<C>& arena)
      : block(block),
        s(s),
        scale(scale),
        bias(bias),
        lr(lr),
        e(lr * scale),
        mlp(block, s, weights, backward && !kKeeps, arena),
        kept(kKeeps ? arena.take(s.K * kept_size(s)) : nullptr),
        z(arena.take(s.N * s.ld())),
        g(arena.take((kKeeps ? s.K : 1) * s.N * s.ld())),
        errors(arena.take(2 * s.N)),
        scaled(arena.take_aside(s.N * s.ld(), gram_formed)),
        h(arena.take_aside(s.N * s.D, gram_formed)) {}

  // Elements of the activations of a step.
  KERNELMETA_INLINE static int64_t kept_size(const typename B::Sizes& s) {
    Arena<C> count;
    typename Mlp<B>::Activations unused(count, s, true);
    return count.used();
  }

  // In the space of the rows, from trace.u[0] = C (rows times theta) and trace.r2[0] = |theta|^2 on: fills
  // the trace. stats: [K][2][2][H] or null.
  KERNELMETA_INLINE void forward(const Trace<C>& trace, C* stats) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      C* u = trace.u + n * ld;
      const C floor = C(kNormFloor);
      const C r2 = B::max(trace.r2[n], floor * floor);
      const C inverse = C(1) / B::sqrt(r2);
      row.each([&](auto q) { q.store(u, q.load(u) * inverse); });
      row.one([&] {
        trace.r2[n] = r2;
        trace.lost[n] = theta_at_floor(r2);  // a step is not orthogonal to it
        errors[2 * n] = errors[2 * n + 1] = C(1);
        if (trace.a) trace.a[n] = C(1);
      });
      if (trace.p) row.each([&](auto q) { q.store(trace.p + n * ld, q.zero()); });
    });
    for (int64_t k = 0; k < s.K; ++k) step(trace, k, stats_of(stats, k));
  }

  // Whether it lost too much, for some class.
  KERNELMETA_INLINE bool lost(const Trace<C>& trace) const {
    return trace.lost && block.any(s.N, [&](int64_t n) { return !(trace.lost[n] == C(0)); });
  }

  // In D dimensions, from trace.theta[0] on: fills the trace. inverse: 1 / |x| of the rows, null where they
  // are normalised. again: U and r2 are there already; theta of every step and w are wanted.
  template <class F>
  __host__ __device__ KERNELMETA_NOINLINE void direct_forward(const Trace<C>& trace,
                                                              const FeatureRows<F>& rows, const C* inverse,
                                                              C* stats, bool again = false) {
    const int64_t N = s.N, ND = N * s.D, ld = s.ld();
    const DirectSteps<B, F> steps = direct<F>(inverse);
    if (!again) steps.norms(trace.theta, trace.r2);
    for (int64_t k = 0; k <= s.K; ++k) {
      C *theta = trace.theta + k * ND, *r2 = trace.r2 + k * N, *u = trace.u + k * N * ld;
      steps.directions(theta, r2);
      if (!again) steps.cosines(part(), rows, u);
      if (k == s.K) return;
      guess(u, k, stats_of(stats, k));
      C* w = trace.w + k * ND;
      steps.pull(g_of(k), part(), rows, w);
      steps.step(theta, r2, e, w, theta + ND, r2 + N);
    }
  }

  // Z = s (U + b), transposed into [Q][N].
  KERNELMETA_INLINE void logits(const Trace<C>& trace, C* out) {
    const C* u = trace.u + s.K * s.N * s.ld();
    const int64_t N = s.N, ld = s.ld();
    block.unfenced().each_item(s.Q, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) out[q * N + n] = scale * (u[n * ld + q] + bias);
    });
  }

  // In the space of the rows: grad_logits [Q][N] -> adjoint.gu, gr2 of the start; MLP gradients are added to
  // `grad`. gp and ga must hold the gradients of P_K and a_K where the trace has weights. With kKeeps, adj.gs
  // is g.
  KERNELMETA_INLINE void backward(const Trace<C>& trace, const C* grad_logits, const Adjoint& adj,
                                  const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, ld = s.ld();
    begin_backward(grad_logits, adj);
    through_classifier(trace.u + s.K * N * ld, adj);
    for (int64_t k = s.K - 1; k >= 0; --k) step_backward(trace, k, adj, grad);
  }

  // In D dimensions: grad_logits [Q][N] and gtheta [N][D], the gradient of theta_K -> gtheta, that of the
  // start. Gradients of the MLP, and of the normalised rows (over |x|, where `inverse` is given), gquery
  // [Q][D] (or null), are added.
  template <class F>
  __host__ __device__ KERNELMETA_NOINLINE void direct_backward(const Trace<C>& trace,
                                                               const FeatureRows<F>& rows, const C* inverse,
                                                               const C* grad_logits, const Adjoint& adj,
                                                               const FoldedMlpGrad<C>& grad, C* gtheta,
                                                               C* gquery) {
    const int64_t N = s.N, ND = N * s.D, ld = s.ld();
    const DirectSteps<B, F> steps = direct<F>(inverse);
    begin_backward(grad_logits, adj);
    steps.directions(trace.theta + s.K * ND, trace.r2 + s.K * N);
    for (int64_t k = s.K;; --k) {
      through_classifier(trace.u + k * N * ld, adj);
      steps.cosines_backward(trace.r2 + k * N, part(), rows, adj.gu, adj.gv, gtheta, gquery);
      if (k == 0) return;
      direct_step_backward(trace, steps, k - 1, rows, adj, grad, gtheta, gquery);
    }
  }

 private:
  KERNELMETA_INLINE RowRange part() const { return {0, s.Q}; }
  template <class F>
  KERNELMETA_INLINE DirectSteps<B, F> direct(const C* inverse) const {
    return {block, s.N, s.D, s.Q, s.ld(), inverse, h, scaled};
  }
  KERNELMETA_INLINE C* stats_of(C* stats, int64_t k) const { return stats ? stats + k * 4 * s.H : nullptr; }
  KERNELMETA_INLINE C* g_of(int64_t k) const { return kKeeps ? g + k * s.N * s.ld() : g; }

  // adj.gz = grad_logits [Q][N], transposed; sums, gu and gr2 begin at zero.
  KERNELMETA_INLINE void begin_backward(const C* grad_logits, const Adjoint& adj) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.each_item(Q, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) adj.gz[n * ld + q] = grad_logits[q * N + n];
    });
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      row.one([&] {
        adj.gr2[n] = 0;
        adj.gscale.clear(n);
        adj.gbias.clear(n);
      });
      row.each([&](auto q) { q.store(adj.gu + n * ld, q.zero()); });
    });
  }

  // Class n before step k, whose G is gs [N][ld].
  KERNELMETA_INLINE StepFrom<C> state(const Trace<C>& trace, int64_t k, int64_t n, const C* gs) const {
    const int64_t ld = s.ld(), i = k * s.N + n;
    return {e,
            trace.r2[i],
            trace.u + i * ld,
            trace.ag + i * ld,
            gs + n * ld,
            trace.a ? trace.a + i : nullptr,
            trace.p ? trace.p + i * ld : nullptr};
  }

  KERNELMETA_INLINE typename Mlp<B>::Activations activations(int64_t k) const {
    Arena<C> memory(kept + k * kept_size(s));
    return {memory, s, true};
  }

  KERNELMETA_INLINE void classify(const C* u) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(z + n * ld, (q.load(u + n * ld) + bias) * scale); });
    });
  }

  // adj.gz, the gradient of Z = s (U + b), goes into gu, gscale and gbias.
  KERNELMETA_INLINE void through_classifier(const C* u, const Adjoint& adj) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      const C *gz = adj.gz + n * ld, *un = u + n * ld;
      C* gu = adj.gu + n * ld;
      const auto [sum, along] =
          row.sums([&](auto q) { return q.load(gz); }, [&](auto q) { return q.load(gz) * q.load(un); }).of;
      row.one([&] {
        adj.gscale.add(n, along);
        adj.gscale.add(n, bias * sum);
        adj.gbias.add(n, scale * sum);
      });
      row.each([&](auto q) { q.store(gu, q.load(gu) + q.load(gz) * scale); });
    });
  }

  // G of step k from U; leaves the activations that the backward pass wants where it finds them.
  KERNELMETA_INLINE void guess(const C* u, int64_t k, C* stats) {
    classify(u);
    if constexpr (kKeeps) mlp.act = activations(k);
    mlp.forward(z, g_of(k), stats);
  }
  // The same, for the backward pass.
  KERNELMETA_INLINE void guess_again(const C* u, int64_t k, C* gs) {
    classify(u);
    if constexpr (kKeeps)
      mlp.act = activations(k);
    else
      mlp.forward(z, gs, nullptr);
  }

  __host__ __device__ KERNELMETA_NOINLINE void step(const Trace<C>& trace, int64_t k, C* stats) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    C* gs = g_of(k);
    guess(trace.u + k * N * ld, k, stats);
    block.mm(N, Q, Q, {gs, ld, 1}, trace.gram, ld, trace.ag + k * N * ld, ld, nullptr);
    block.rows(N, Q, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      cosine_step<B>(LiveRow(row), state(trace, k, n, gs),
                     {trace.r2 + i, trace.u + i * ld, errors + 2 * n, trace.lost + n,
                      trace.a ? trace.a + i : nullptr, trace.p ? trace.p + i * ld : nullptr});
    });
  }

  KERNELMETA_INLINE void step_backward(const Trace<C>& trace, int64_t k, const Adjoint& adj,
                                       const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    const C* u = trace.u + k * N * ld;
    C *gs = adj.gs + k * N * ld, *gag = adj.gag + k * N * ld;
    guess_again(u, k, gs);
    block.rows(N, Q, [&](int64_t n, auto row) {
      const int64_t i = n * ld;
      const C ge = cosine_step_backward<B>(LiveRow(row), state(trace, k, n, gs),
                                           {adj.gr2 + n, adj.gu + i, adj.ga ? adj.ga + n : nullptr,
                                            adj.gp ? adj.gp + i : nullptr, adj.gg + i, gag + i});
      row.one([&] { adj.gscale.add(n, lr * ge); });
    });
    block.mm_add(N, Q, Q, {gag, ld, 1}, trace.gram, ld, adj.gg, ld);
    mlp.backward(z, adj.gg, adj.gz, adj.g2, grad);
    through_classifier(u, adj);
  }

  // adj.gz = what step k passes on to the logits before it.
  template <class F>
  __host__ __device__ KERNELMETA_NOINLINE void direct_step_backward(
      const Trace<C>& trace, const DirectSteps<B, F>& steps, int64_t k, const FeatureRows<F>& rows,
      const Adjoint& adj, const FoldedMlpGrad<C>& grad, C* gtheta, C* gquery) {
    const int64_t N = s.N, Q = s.Q, ND = N * s.D, ld = s.ld();
    const C *u = trace.u + k * N * ld, *r2 = trace.r2 + k * N;
    C* gs = kKeeps ? adj.gs + k * N * ld : adj.gs;
    guess_again(u, k, gs);
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      const C dot = row.sum([&](auto q) { return q.load(u + n * ld) * q.load(gs + n * ld); });
      row.one([&] { adj.dot[n] = theta_at_floor(r2[n]) ? C(0) : dot; });
    });
    steps.directions(trace.theta + k * ND, r2);
    steps.step_backward(r2, trace.w + k * ND, e, adj.dot, {}, gtheta, adj.gv, adj.ge);
    steps.pull_backward(adj.gv, gs, part(), rows, adj.gg, gquery);
    mlp.backward(z, adj.gg, adj.gz, adj.g2, grad);
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      row.one([&] { adj.gscale.add(n, lr * adj.ge[n]); });
      row.each([&](auto q) { q.store(adj.gu + n * ld, q.zero()); });
    });
  }
};

}  // namespace kernelmeta
