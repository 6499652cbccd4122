// The inner loop of one task in the dual form, and its adjoint.
//
// The classifier theta never leaves the span of theta0 and the normalised query rows, so its whole state is
// U [N][ld] (cosines of every query row with every class) and r2 [N] (squared norms). cosine_step.h says what
// a step does to it, with A the Gram matrix of the normalised query rows and G = MLP(s (U + b)).
#pragma once

#include "engine/cosine_step.h"
#include "engine/gram.h"
#include "engine/mlp.h"

namespace kernelmeta {

inline constexpr double kNormFloor = 1e-12;  // lower bound of |x| and |theta|, as in F.normalize

// What the forward pass leaves for the backward pass, one task; see trace_size in kernelmeta/ops/sib.py.
template <class C>
struct Trace {
  C* theta0;   // [N][D]
  C* inverse;  // [Q]           1 / |x_q|
  C* r2;       // [K+1][N]
  C* u;        // [K+1][N][ld]
  C* gram;     // [Q][ld]       A, where forms_gram says so
  C* ag;       // [K][N][ld]    A G
  C* a;        // [K+1][N]      with weights only
  C* p;        // [K+1][N][ld]  with weights only

  // theta0 comes first, so that the rest is one stretch of memory where both arenas are the same.
  template <class S>
  __host__ __device__ __forceinline__ Trace(Arena<C>& features, Arena<C>& arena, const S& s, bool gram_formed,
                                            bool weights)
      : theta0(features.take(s.N * s.D)),
        inverse(arena.take(s.Q)),
        r2(arena.take((s.K + 1) * s.N)),
        u(arena.take((s.K + 1) * s.N * s.ld())),
        gram(gram_formed ? arena.take(s.Q * s.ld()) : nullptr),
        ag(arena.take(s.K * s.N * s.ld())),
        a(weights ? arena.take((s.K + 1) * s.N) : nullptr),
        p(weights ? arena.take((s.K + 1) * s.N * s.ld()) : nullptr) {}

  // The trace is handed out: nothing in it may depend on what the memory held before.
  template <class B>
  __host__ __device__ __forceinline__ void clear_padding(B& block, const typename B::Sizes& s) const {
    const int64_t KN = s.K * s.N, N = s.N;
    block.unfenced().each_item(4 + 2 * (KN + N) + KN + s.Q, [&](int64_t i) {
      const auto row = [&i](C* array, int64_t n, int64_t length) {
        if (i < n) {
          for (int64_t j = length; array && j < padded(length); ++j) array[i * padded(length) + j] = 0;
        }
        i -= n;
        return i < 0;
      };
      (void)(row(theta0, 1, N * s.D) || row(inverse, 1, s.Q) || row(r2, 1, KN + N) || row(u, KN + N, s.Q) ||
             row(gram, s.Q, s.Q) || row(ag, KN, s.Q) || row(a, 1, KN + N) || row(p, KN + N, s.Q));
    });
  }
};

// Scratch of the backward pass of an inner loop.
template <class B>
struct LoopAdjoint {
  using C = typename B::Scalar;

  C* gu;              // [N][ld]   gradient of U, in: of U_K, out: of U_0
  C* gr2;             // [N]       gradient of r2, likewise
  C *gp, *ga;         // [N][ld], [N]: of P and a, with weights only
  C *gg, *gz;         // [N][ld]
  C* gag;             // [K][N][ld] gradient of AG; all steps are kept for the Gram matrix' gradient
  C* gs;              // [K][N][ld] G of every step, likewise
  C* g2;              // [H][ld]: of the MLP
  C *gscale, *gbias;  // [N] each: one sum per class, added up in order at the end

  __host__ __device__ __forceinline__ LoopAdjoint(Arena<C>& arena, const typename B::Sizes& s, bool weights)
      : gu(arena.take(s.N * s.ld())),
        gr2(arena.take(s.N)),
        gp(weights ? arena.take(s.N * s.ld()) : nullptr),
        ga(weights ? arena.take(s.N) : nullptr),
        gg(arena.take(s.N * s.ld())),
        gz(arena.take(s.N * s.ld())),
        gag(arena.take(s.K * s.N * s.ld())),
        gs(arena.take(s.K * s.N * s.ld())),
        g2(arena.take(s.H * s.ld())),
        gscale(arena.take(s.N)),
        gbias(arena.take(s.N)) {}
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
  C* kept;   // [K][kept_size]: activations of every step
  C *z, *g;  // [N][ld], [N][ld]; of g one for every step that is kept

  __host__ __device__ __forceinline__ InnerLoop(B& block, const typename B::Sizes& s,
                                                const FoldedMlp<C>& weights, C scale, C bias, C lr,
                                                bool backward, Arena<C>& arena)
      : block(block),
        s(s),
        scale(scale),
        bias(bias),
        lr(lr),
        e(lr * scale),
        mlp(block, s, weights, backward && !kKeeps, arena),
        kept(kKeeps ? arena.take(s.K * kept_size(s)) : nullptr),
        z(arena.take(s.N * s.ld())),
        g(arena.take((kKeeps ? s.K : 1) * s.N * s.ld())) {}

  // Elements of the activations of a step.
  __host__ __device__ __forceinline__ static int64_t kept_size(const typename B::Sizes& s) {
    Arena<C> count;
    typename Mlp<B>::Activations unused(count, s, true);
    return count.used();
  }

  // From trace.u[0] = C (rows times theta0) and trace.r2[0] = |theta0|^2 on: fills the trace.
  // stats: [K][2][2][H] or null.
  __host__ __device__ __forceinline__ void forward(const Trace<C>& trace, const GramMatrix<B>& gram,
                                                   C* stats) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.rows(N, Q, [&](int64_t n, auto row) {
      C* u = trace.u + n * ld;
      const C floor = C(kNormFloor);
      const C r2 = B::max(trace.r2[n], floor * floor);
      const C inverse = C(1) / B::sqrt(r2);
      row.each([&](auto q) { q.store(u, q.load(u) * inverse); });
      row.one([&] {
        trace.r2[n] = r2;
        if (trace.a) trace.a[n] = C(1);
      });
      if (trace.p) row.each([&](auto q) { q.store(trace.p + n * ld, q.zero()); });
    });
    for (int64_t k = 0; k < s.K; ++k) step(trace, gram, k, stats ? stats + k * 4 * s.H : nullptr);
  }

  // Z = s (U + b), transposed into [Q][N].
  __host__ __device__ __forceinline__ void logits(const Trace<C>& trace, C* out) {
    const C* u = trace.u + s.K * s.N * s.ld();
    const int64_t N = s.N, ld = s.ld();
    block.unfenced().each_item(s.Q, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) out[q * N + n] = scale * (u[n * ld + q] + bias);
    });
  }

  // grad_logits [Q][N] -> adjoint.gu, gr2 of the start; MLP gradients are added to `grad`.
  // gp and ga must hold the gradients of P_K and a_K where the trace has weights. With kKeeps, adj.gs is g.
  __host__ __device__ __forceinline__ void backward(const Trace<C>& trace, const GramMatrix<B>& gram,
                                                    const C* grad_logits, const Adjoint& adj,
                                                    const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    block.each_item(Q, [&](int64_t q) {
      for (int64_t n = 0; n < N; ++n) adj.gz[n * ld + q] = grad_logits[q * N + n];
    });
    block.unfenced().rows(N, Q, [&](int64_t n, auto row) {
      row.one([&] {
        adj.gr2[n] = 0;
        adj.gscale[n] = 0;
        adj.gbias[n] = 0;
      });
      row.each([&](auto q) { q.store(adj.gu + n * ld, q.zero()); });
    });
    through_classifier(trace.u + s.K * N * ld, adj);
    for (int64_t k = s.K - 1; k >= 0; --k) step_backward(trace, gram, k, adj, grad);
  }

 private:
  // Class n before step k, whose G is gs [N][ld].
  __host__ __device__ __forceinline__ StepFrom<C> state(const Trace<C>& trace, int64_t k, int64_t n,
                                                        const C* gs) const {
    const int64_t ld = s.ld(), i = k * s.N + n;
    return {e,
            trace.r2[i],
            trace.u + i * ld,
            trace.ag + i * ld,
            gs + n * ld,
            trace.a ? trace.a + i : nullptr,
            trace.p ? trace.p + i * ld : nullptr};
  }

  __host__ __device__ __forceinline__ typename Mlp<B>::Activations activations(int64_t k) const {
    Arena<C> memory(kept + k * kept_size(s));
    return {memory, s, true};
  }

  __host__ __device__ __forceinline__ void classify(const C* u) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(z + n * ld, (q.load(u + n * ld) + bias) * scale); });
    });
  }

  // adj.gz, the gradient of Z = s (U + b), goes into gu, gscale and gbias.
  __host__ __device__ __forceinline__ void through_classifier(const C* u, const Adjoint& adj) {
    const int64_t ld = s.ld();
    block.rows(s.N, s.Q, [&](int64_t n, auto row) {
      const C *gz = adj.gz + n * ld, *un = u + n * ld;
      C* gu = adj.gu + n * ld;
      const C sum = row.sum([&](auto q) { return q.load(gz); });
      const C along = row.sum([&](auto q) { return q.load(gz) * q.load(un); });
      row.one([&] {
        adj.gscale[n] += along + bias * sum;
        adj.gbias[n] += scale * sum;
      });
      row.each([&](auto q) { q.store(gu, q.load(gu) + q.load(gz) * scale); });
    });
  }

  __host__ __device__ KERNELMETA_GPU_CALL void step(const Trace<C>& trace, const GramMatrix<B>& gram,
                                                    int64_t k, C* stats) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    const C* u = trace.u + k * N * ld;
    C* ag = trace.ag + k * N * ld;
    C* gs = kKeeps ? g + k * N * ld : g;
    classify(u);
    if constexpr (kKeeps) mlp.act = activations(k);
    mlp.forward(z, gs, stats);
    gram.multiply(gs, ag, false);
    block.rows(N, Q, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      cosine_step<B>(LiveRow(row), state(trace, k, n, gs),
                     {trace.r2 + i, trace.u + i * ld, trace.a ? trace.a + i : nullptr,
                      trace.p ? trace.p + i * ld : nullptr});
    });
  }

  __host__ __device__ __forceinline__ void step_backward(const Trace<C>& trace, const GramMatrix<B>& gram,
                                                         int64_t k, const Adjoint& adj,
                                                         const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, Q = s.Q, ld = s.ld();
    const C* u = trace.u + k * N * ld;
    C *gs = adj.gs + k * N * ld, *gag = adj.gag + k * N * ld;
    classify(u);
    if constexpr (kKeeps)
      mlp.act = activations(k);
    else
      mlp.forward(z, gs, nullptr);
    block.rows(N, Q, [&](int64_t n, auto row) {
      const int64_t i = n * ld;
      const C ge = cosine_step_backward<B>(LiveRow(row), state(trace, k, n, gs),
                                           {adj.gr2 + n, adj.gu + i, adj.ga ? adj.ga + n : nullptr,
                                            adj.gp ? adj.gp + i : nullptr, adj.gg + i, gag + i});
      row.one([&] { adj.gscale[n] += lr * ge; });
    });
    gram.multiply(gag, adj.gg, true);
    mlp.backward(z, adj.gg, adj.gz, adj.g2, grad);
    through_classifier(u, adj);
  }
};

}  // namespace kernelmeta
