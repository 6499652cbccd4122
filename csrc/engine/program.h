// A program: phases of steps that refine one task's classifier, in the space of its rows, and the adjoint.
//
// The live rows are the query rows and, where a phase uses them, the support rows. The classifier theta moves
// in the span of its start and of the normalised rows (cosine) or of the rows (linear), so its state is what
// it says about the live rows. With A the Gram matrix and G what the phase's oracle gives for the phase's
// rows, a step of rate lr is
//
//   linear   Z  = X W^T + b              Z' = Z - lr (A + 1) G             W = W0 + P^T X, b = b0 + sum(P)
//                                        P' = P - lr G
//   cosine   as in cosine_step.h: the state is U and r2, with e = lr * scale; theta = a theta0 + Xhat^T P
//   euclidean  as in euclidean_step.h: likewise, theta = a theta0 + X^T P
//
// (the + 1 is the bias' part). Soft assignment is not a gradient step: with p = softmax(Z), theta_a the
// classifier at the start of the phase and c its weight, the support rows of each class, it moves by lr to
//
//   (c theta_a + Xhat^T p) / m,   m = c + sum(p)          (soft k-means, Ren et al. 2018, where lr = 1)
//
// A joint step's G is the sum of several oracles', each of the rows of one kind, times its weight; it is of
// all live rows, zero where no oracle looks.
//
// The adjoint of a step needs G again; it is computed from the state, which the trace holds for every step.
#pragma once

#include "engine/class_sums.h"
#include "engine/euclidean_step.h"
#include "engine/program_shape.h"

namespace kernelmeta {

// What the start of a soft assignment weighs in a class: its support rows, or one where (nearly) no row
// belongs to it, so that it stays where it is.
template <class C>
KERNELMETA_INLINE C anchor_weight(C support_rows, C mass) {
  return support_rows + mass < C(1e-12) ? C(1) : support_rows;
}

template <class B>
struct ProgramLoop {
  using C = typename B::Scalar;

  B& block;
  const ProgramShape& s;
  const ProgramParameters<C>& with;
  C *z, *g;  // [N][widest], [N][widest_step]
  // (behind g, where some steps are joint, what one of their oracles gives: [N][widest])
  C* errors;  // [N][2]: see `loses`
  C* mlp_memory;
  const Sizes support_sizes, query_sizes;  // of the MLP on rows of one kind
  Mlp<B> support_mlp, query_mlp;           // in the same memory
  C* pair_memory;
  PairInputs<B> support_pairs, query_pairs;  // likewise
  Marginals<B> marginals;

  KERNELMETA_INLINE ProgramLoop(B& block, const ProgramShape& s, const ProgramParameters<C>& with,
                                Arena<C>& arena)
      : block(block),
        s(s),
        with(with),
        z(arena.take(s.N * s.widest())),
        g(arena.take(s.N * (s.widest_step<B>() + (s.some_joint<B>() ? s.widest() : 0)))),
        errors(arena.take(2 * s.N)),
        mlp_memory(s.H ? arena.take(mlp_size(s)) : nullptr),
        support_sizes(s.mlp(s.S)),
        query_sizes(s.mlp(s.Q)),
        support_mlp(mlp_in(block, support_sizes, *with.mlp, mlp_memory)),
        query_mlp(mlp_in(block, query_sizes, *with.mlp, mlp_memory)),
        pair_memory(s.pairs ? arena.take(pairs_size(s)) : nullptr),
        support_pairs(pairs_in(block, s.N, s.S, pair_memory)),
        query_pairs(pairs_in(block, s.N, s.Q, pair_memory)),
        marginals(arena, block, s.means ? s.N : 0, s.means && s.uses_support && s.S > s.Q ? s.S : s.Q) {}
  ProgramLoop(const ProgramLoop&) = delete;

  // From trace.u[0] (rows times theta0, plus the bias if linear) and r2[0] on: fills the trace.
  KERNELMETA_INLINE void forward(const ProgramTrace<C>& trace) {
    const int64_t N = s.N, ld = s.ld();
    if (s.cosine) {
      block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
        C* u = trace.u + n * ld;
        const C r2 = B::max(trace.r2[n], C(kNormFloor) * C(kNormFloor));
        const C inverse = C(1) / B::sqrt(r2);
        row.each([&](auto q) { q.store(u, q.load(u) * inverse); });
        row.one([&] {
          trace.r2[n] = r2;
          if (theta_at_floor(r2)) trace.lost[n] = 1;  // a step is not orthogonal to it
          errors[2 * n] = errors[2 * n + 1] = C(1);
          if (trace.a) trace.a[n] = C(1);
        });
      });
    } else if (trace.a) {
      block.unfenced().each_item(N, [&](int64_t n) { trace.a[n] = C(1); });
    }
    int64_t k = 0;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      const int64_t start = k;
      for (const int64_t end = k + phase.steps; k < end; ++k) {
        const RowRange part = s.driving<B>(i);
        C* ag = trace.ag + k * N * ld;
        if (s.is_joint<B>(i)) {
          ask_together(trace, i, k, g);
          move_together(trace, i, ag);
        } else {
          classify(trace, k, part);
          ask(phase, part, g);
          block.mm(N, part.count, ld, {g, part.ld(), 1}, trace.gram(phase.query), ld, ag, ld, nullptr);
        }
        if (phase.oracle == Oracle::kSoftAssignment)
          assignment_step(trace, part, start, k);
        else if (s.cosine)
          step(trace, part, s.others<B>(i), k);
        else if (s.by_distance<B>())
          step_of_distances(trace, part, s.others<B>(i), k);
        else
          linear_step(trace, part, s.others<B>(i), k);
        if (s.is_joint<B>(i) && s.cosine) look_for_parallels(trace, i, k);
      }
    }
  }

  // Whether the space of the rows lost too much, for some class.
  KERNELMETA_INLINE bool lost(const ProgramTrace<C>& trace) const {
    return trace.lost && block.any(s.N, [&](int64_t n) { return !(trace.lost[n] == C(0)); });
  }

  // The query rows' Z after the last step, [Q][ways], minus infinity beyond the task's own N.
  KERNELMETA_INLINE void logits(const ProgramTrace<C>& trace, int64_t ways, C* out) const {
    const int64_t N = s.N, ld = s.ld();
    const C* u = trace.u + s.K * N * ld + s.query().first;
    const C scale = with.scale;
    block.unfenced().each_item(s.Q * ways, [&](int64_t i) {
      const int64_t n = i % ways;
      out[i] = n < N ? scale * (u[n * ld + i / ways] + shift(trace, s.K, n)) : -C(__builtin_inff());
    });
  }

  // Scratch of the backward pass.
  struct Adjoint {
    C* gu;       // [N][ld]     gradient of U or Z, in the end: of the start's
    C* gr2;      // [N]         not linear, like ga; what belongs to the anchor: cosine only
    C *gp, *ga;  // [N][ld], [N]: of P and a, with coefficients only
    C *gg, *gz;  // [N][widest_step], [N][widest]
    C* gag;      // [K][N][ld]  gradient of A G; all steps are kept for the Gram matrix' gradient
    C* gs;       // G of every step, likewise; see ProgramShape::packed
    C* gh;       // [H][mlp_ld], MLP scratch
    C *ganchor, *gra, *gna, *gpa, *gaa;  // <theta, theta_a>; R, r2, P and a of the anchor
    ClassSums<C> gscale, gbias, gtarget;
    C* grate;  // [N], of one step
    // In D dimensions; cosine only.
    C *gtheta, *gv, *gtheta_a;    // [N][D]: gradients of theta, of the pull, of the anchor
    C *dot, *ge, *gdot, *gr, *m;  // [N]; m: of a soft assignment

    KERNELMETA_INLINE Adjoint(Arena<C>& arena, const ProgramShape& s)
        : gu(arena.take(s.N * s.ld())),
          gr2(arena.take(s.N)),
          gp(s.coefficients ? arena.take(s.N * s.ld()) : nullptr),
          ga(s.coefficients ? arena.take(s.N) : nullptr),
          gg(arena.take(s.N * s.widest_step<B>())),
          gz(arena.take(s.N * s.widest())),
          gag(arena.take(s.K * s.N * s.ld())),
          gs(arena.take(s.packed<B>(s.n_phases))),
          gh(s.H ? arena.take(s.H * s.mlp_ld()) : nullptr),
          ganchor(arena.take(s.N)),
          gra(s.cosine ? arena.take(s.N * s.ld()) : nullptr),
          gna(arena.take(s.N)),
          gpa(s.cosine && s.coefficients ? arena.take(s.N * s.ld()) : nullptr),
          gaa(arena.take(s.N)),
          gscale(arena, s.N),
          gbias(arena, s.N),
          gtarget(arena, s.N),
          grate(arena.take(s.N)),
          gtheta(arena.take_aside(s.cosine ? s.N * s.D : 0, true)),
          gv(arena.take_aside(s.cosine ? s.N * s.D : 0, true)),
          gtheta_a(arena.take_aside(s.cosine ? s.N * s.D : 0, true)),
          dot(arena.take_aside(s.N, true)),
          ge(arena.take_aside(s.N, true)),
          gdot(arena.take_aside(s.N, true)),
          gr(arena.take_aside(s.N, true)),
          m(arena.take_aside(s.N, true)) {}
  };

  // grad_logits [Q][ways] -> adj.gu, gr2 of the start; gradients of parameters are added to `grad`.
  // gp and ga must hold the gradients of P_K and a_K where the trace has them.
  KERNELMETA_INLINE void backward(const ProgramTrace<C>& trace, const C* grad_logits, int64_t ways,
                                  const Adjoint& adj, const ProgramLoopGrad<C>& grad) {
    const int64_t N = s.N, ld = s.ld();
    begin_backward(grad_logits, ways, adj);
    through_classifier(trace, s.K, s.query(), adj);
    int64_t k = s.K;
    for (int64_t i = s.n_phases - 1; i >= 0; --i) {
      const Phase& phase = s.phases[i];
      const bool assigns = phase.oracle == Oracle::kSoftAssignment;
      const int64_t start = k - phase.steps;
      if (assigns) clear_anchor(adj);
      while (k-- > start) {
        const RowRange part = s.driving<B>(i);
        C* gs = adj.gs + s.packed<B>(i) + (k - start) * N * part.ld();
        const C* gag = adj.gag + k * N * ld;
        if (s.is_joint<B>(i)) {
          ask_together(trace, i, k, gs);
        } else {
          classify(trace, k, part);
          ask(phase, part, gs);
        }
        if (assigns)
          assignment_backward(trace, part, start, k, adj, gs);
        else if (s.cosine)
          step_backward(trace, part, s.others<B>(i), k, adj, gs);
        else if (s.by_distance<B>())
          backward_of_distances(trace, part, s.others<B>(i), k, adj, gs);
        else
          linear_backward(trace, part, k, adj, gs);
        add_rate(k, adj, grad);
        if (with.first_order) continue;
        if (s.is_joint<B>(i)) {
          come_back_together(trace, i, k, adj);
          ask_back_together(trace, i, k, adj, grad);
          continue;
        }
        // gg += A gag, of the phase's rows.
        block.dots(N, FeatureRows<C>{gag, ld, nullptr}, part.count,
                   FeatureRows<C>{trace.gram(phase.query), ld, nullptr}, ld, g, part.ld());
        block.rows(N, ld, [&](int64_t n, auto row) {
          C* gg = adj.gg + n * part.ld();
          row.part(part.first, part.count).each([&](auto q) {
            q.store(gg, q.load(gg) + q.load(g + n * part.ld()));
          });
        });
        ask_backward(phase, part, gs, adj.gg, adj, grad);
        through_classifier(trace, k, part, adj, !blind_to_shift(phase.oracle));
      }
      k = start;
      if (assigns) through_anchor(trace, start, adj);
    }
    finish_backward(adj, grad);
  }

  // ---- what both forms of a step use

  // adj.gz = grad_logits [Q][ways] of the query rows, transposed; sums, gu and gr2 begin at zero, and gag, of
  // which a step writes the rows of each part but not what pads them.
  KERNELMETA_INLINE void begin_backward(const C* grad_logits, int64_t ways, const Adjoint& adj) {
    const int64_t N = s.N, ld = s.ld();
    const RowRange query = s.query();
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      row.one([&] {
        adj.gr2[n] = 0;
        adj.gscale.clear(n);
        adj.gbias.clear(n);
        adj.gtarget.clear(n);
      });
      row.each([&](auto q) { q.store(adj.gu + n * ld, q.zero()); });
    });
    block.unfenced().rows(s.K * N, ld, [&](int64_t i, auto row) {
      row.each([&](auto q) { q.store(adj.gag + i * ld, q.zero()); });
    });
    block.rows(N, query.ld(), [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(adj.gz + n * query.ld(), q.zero()); });
    });
    block.each_item(N * s.Q, [&](int64_t i) {
      adj.gz[i / s.Q * query.ld() + i % s.Q] = grad_logits[i % s.Q * ways + i / s.Q];
    });
  }

  KERNELMETA_INLINE void add_rate(int64_t k, const Adjoint& adj, const ProgramLoopGrad<C>& grad) const {
    block.unfenced().each_item(1, [&](int64_t) {
      for (int64_t n = 0; n < s.N; ++n) grad.rates[k] += adj.grate[n];
    });
  }

  // Sums over the classes -> grad.
  KERNELMETA_INLINE void finish_backward(const Adjoint& adj, const ProgramLoopGrad<C>& grad) const {
    block.unfenced().each_item(3, [&](int64_t which) {
      C* total = which == 0 ? grad.scale : which == 1 ? grad.bias : grad.target;
      *total += (which == 0 ? adj.gscale : which == 1 ? adj.gbias : adj.gtarget).total();
    });
  }

  // What is added to class n's U before step k.
  KERNELMETA_INLINE C shift(const ProgramTrace<C>& trace, int64_t k, int64_t n) const {
    return s.by_distance<B>() ? trace.r2[k * s.N + n] * C(-0.5) : with.bias;
  }

  // z = scale (U + shift) of one part, before step k.
  KERNELMETA_INLINE void classify(const ProgramTrace<C>& trace, int64_t k, RowRange part) {
    const int64_t ld = s.ld();
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      const C* from = trace.u + (k * s.N + n) * ld + part.first;
      const C own = shift(trace, k, n);
      row.part(part.first, part.count).each([&](auto q) {
        q.store(z + n * part.ld(), (q.load(from) + own) * with.scale);
      });
    });
  }

  KERNELMETA_INLINE OracleRows<B> oracle_rows(const Phase& phase, RowRange part) const {
    const C count = phase.mean ? C(part.count) : C(1);
    return {block,        s.N,   part.count, part.ld(), phase.query ? nullptr : with.y,
            C(1) / count, count, with.target};
  }

  // to = G of z
  __host__ __device__ KERNELMETA_NOINLINE void ask(const Phase& phase, RowRange part, C* to) {
    if (phase.oracle == Oracle::kSyntheticGradient) {
      mlp(phase).forward(z, to, nullptr);
      if (phase.mean) scale_rows(to, part, C(1) / C(part.count));
      return;
    }
    if (phase.oracle == Oracle::kEquivariantGradient) {
      PairInputs<B>& of_pairs = pairs(phase);
      of_pairs.forward(z);
      mlp(phase).forward(of_pairs.x, of_pairs.out, nullptr);
      of_pairs.take_out(to);
      if (phase.mean) scale_rows(to, part, C(1) / C(part.count));
      return;
    }
    if (phase.looks_at_means<B>()) {
      each_bag(phase, part, nullptr, [&](const auto& bag, C share) {
        marginals.forward(phase.oracle, bag, of_marginals(phase), share, z, to);
      });
      clear_padding(part, to);
      return;
    }
    const OracleRows<B> rows = oracle_rows(phase, part);
    with_oracle(phase.oracle, [&](auto oracle) { oracle.forward(rows, z, to); });
  }

  // What marginals.h wants of a phase besides: tau or alpha.
  KERNELMETA_INLINE static C of_marginals(const Phase& phase) {
    return C(phase.shares == Shares::kNone ? phase.number : phase.tau());
  }

  // adj.gz = (dG/dz)^T gg; after ask(phase, part, gs).
  __host__ __device__ KERNELMETA_NOINLINE void ask_backward(const Phase& phase, RowRange part, const C* gs,
                                                            C* gg, const Adjoint& adj,
                                                            const ProgramLoopGrad<C>& grad) {
    if (phase.oracle == Oracle::kSyntheticGradient) {
      if (phase.mean) scale_rows(gg, part, C(1) / C(part.count));
      mlp(phase).backward(z, gg, adj.gz, adj.gh, *grad.mlp);
      return;
    }
    if (phase.oracle == Oracle::kEquivariantGradient) {
      PairInputs<B>& of_pairs = pairs(phase);
      if (phase.mean) scale_rows(gg, part, C(1) / C(part.count));
      of_pairs.put_in(gg);
      mlp(phase).backward(of_pairs.x, of_pairs.out, of_pairs.gx, adj.gh, *grad.mlp);
      of_pairs.backward(z, adj.gz);
      return;
    }
    if (phase.looks_at_means<B>()) {
      each_bag(phase, part, grad.proportions, [&](const auto& bag, C share) {
        marginals.backward(phase.oracle, bag, of_marginals(phase), share, z, gs, gg, adj.gz);
      });
      clear_padding(part, adj.gz);
      return;
    }
    const OracleRows<B> rows = oracle_rows(phase, part);
    if (phase.oracle == Oracle::kSquaredError) {
      block.unfenced().rows(s.N, s.ld(), [&](int64_t n, auto row) {
        const int64_t i = n * part.ld();
        const C along =
            row.part(part.first, part.count).sum([&](auto q) { return q.load(rows.y + i) * q.load(gg + i); });
        row.one([&] { adj.gtarget.add(n, -along * rows.share); });
      });
    }
    with_oracle(phase.oracle, [&](auto oracle) { oracle.backward(rows, z, gs, gg, adj.gz); });
  }

  // Zeros behind the rows, as the other oracles leave them.
  KERNELMETA_INLINE void clear_padding(RowRange part, C* array) const {
    const int64_t ld = part.ld(), more = ld - part.count;
    block.each_item(s.N * more, [&](int64_t i) { array[i / more * ld + part.count + i % more] = C(0); });
  }

  // f(bag, what the sum over the rows is multiplied by) for every bag with a row. Entropies take all rows for
  // one.
  template <class F>
  KERNELMETA_INLINE void each_bag(const Phase& phase, RowRange part, C* grad_proportions, F f) const {
    const C share = phase.mean ? C(1) / C(part.count) : C(1);
    const bool given = phase.shares == Shares::kGiven;
    const int64_t* offsets = phase.shares == Shares::kNone ? nullptr : with.bag_offsets;
    for (int64_t b = 0; b < (offsets ? with.bags : 1); ++b) {
      const int64_t first = offsets ? offsets[b] : 0;
      const int64_t rows = (offsets ? offsets[b + 1] : part.count) - first;
      if (rows == 0) continue;
      const int64_t at = b * with.proportions_ld;
      f(typename Marginals<B>::Bag{part.ld(), first, rows, given ? with.proportions + at : nullptr,
                                   given && grad_proportions ? grad_proportions + at : nullptr},
        share);
    }
  }

  KERNELMETA_INLINE void scale_rows(C* array, RowRange part, C factor) {
    block.rows(s.N, s.ld(), [&](int64_t n, auto row) {
      C* a = array + n * part.ld();
      row.part(part.first, part.count).each([&](auto q) { q.store(a, q.load(a) * factor); });
    });
  }

  // adj.gz, the gradient of a part's z = scale (U + shift) before step k, goes into gu, gscale and gbias or
  // gr2. shifts: whether its sum over the classes is more than rounding.
  KERNELMETA_INLINE void through_classifier(const ProgramTrace<C>& trace, int64_t k, RowRange part,
                                            const Adjoint& adj, bool shifts = true) {
    const int64_t ld = s.ld();
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      const C *gz = adj.gz + n * part.ld(), *un = trace.u + (k * s.N + n) * ld + part.first;
      C* gu = adj.gu + n * ld + part.first;
      const auto of_part = row.part(part.first, part.count);
      if (s.has_length<B>()) {
        const C sum = of_part.sum([&](auto q) { return q.load(gz); });
        const C along = of_part.sum([&](auto q) { return q.load(gz) * q.load(un); });
        row.one([&] {
          adj.gscale.add(n, along);
          if (!shifts && s.cosine) return;
          adj.gscale.add(n, shift(trace, k, n) * sum);
          if (s.cosine)
            adj.gbias.add(n, with.scale * sum);
          else
            adj.gr2[n] -= with.scale * sum * C(0.5);
        });
      }
      of_part.each([&](auto q) { q.store(gu, q.load(gu) + q.load(gz) * with.scale); });
    });
  }

  // ---- joint steps

  // What one of a joint step's oracles gives, [N][its part's ld].
  KERNELMETA_INLINE C* one() const { return g + s.N * s.ld(); }

  // to [N][ld] = G of the joint step k of phase i.
  __host__ __device__ KERNELMETA_NOINLINE void ask_together(const ProgramTrace<C>& trace, int64_t i,
                                                            int64_t k, C* to) {
    const int64_t ld = s.ld();
    block.rows(s.N, ld,
               [&](int64_t n, auto row) { row.each([&](auto q) { q.store(to + n * ld, q.zero()); }); });
    for (int64_t j = s.template first_of<B>(i); j <= i; ++j) {
      const Phase& phase = s.phases[j];
      const RowRange part = s.part(phase.query);
      classify(trace, k, part);
      ask(phase, part, one());
      add_part(one(), part, C(phase.weight), to);
    }
  }

  // to [N][ld], of one part, grows by from [N][part.ld()] times weight.
  KERNELMETA_INLINE void add_part(const C* from, RowRange part, C weight, C* to) const {
    const int64_t ld = s.ld();
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      C* a = to + n * ld + part.first;
      row.part(part.first, part.count).each([&](auto q) {
        q.store(a, q.load(a) + q.load(from + n * part.ld()) * weight);
      });
    });
  }

  // ag = A G, of G in g.
  __host__ __device__ KERNELMETA_NOINLINE void move_together(const ProgramTrace<C>& trace, int64_t i, C* ag) {
    const int64_t ld = s.ld();
    bool moved = false;
    for (int of_query = 0; of_query < 2; ++of_query) {
      if (!s.drive<B>(of_query, i)) continue;
      const RowRange part = s.part(of_query);
      const C *from = g + part.first, *gram = trace.gram(of_query);
      if (moved)
        block.mm_add(s.N, part.count, ld, {from, ld, 1}, gram, ld, ag, ld);
      else
        block.mm(s.N, part.count, ld, {from, ld, 1}, gram, ld, ag, ld, nullptr);
      moved = true;
    }
  }

  // Of a cosine classifier: cosine_step looks at what pads the rows, too.
  __host__ __device__ KERNELMETA_NOINLINE void look_for_parallels(const ProgramTrace<C>& trace, int64_t i,
                                                                  int64_t k) {
    const int64_t ld = s.ld();
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      bool parallel = true;
      for (int of_query = 0; of_query < 2; ++of_query) {
        if (!s.drive<B>(of_query, i)) continue;
        const RowRange part = s.part(of_query);
        const C* u = trace.u + ((k + 1) * s.N + n) * ld + part.first;
        parallel = nearly_parallel(row.part(part.first, part.count), u) && parallel;
      }
      row.one([&] {
        if (parallel) trace.lost[n] = 1;
      });
    });
  }

  // adj.gg += A gag, of the rows that drive the step.
  __host__ __device__ KERNELMETA_NOINLINE void come_back_together(const ProgramTrace<C>& trace, int64_t i,
                                                                  int64_t k, const Adjoint& adj) {
    const int64_t ld = s.ld();
    for (int of_query = 0; of_query < 2; ++of_query) {
      if (!s.drive<B>(of_query, i)) continue;
      const RowRange part = s.part(of_query);
      block.dots(s.N, FeatureRows<C>{adj.gag + k * s.N * ld, ld, nullptr}, part.count,
                 FeatureRows<C>{trace.gram(of_query), ld, nullptr}, ld, g, part.ld());
      add_part(g, part, C(1), adj.gg);
    }
  }

  // adj.gg, of G -> adj.gu (and adj.gr2), and what is learned.
  __host__ __device__ KERNELMETA_NOINLINE void ask_back_together(const ProgramTrace<C>& trace, int64_t i,
                                                                 int64_t k, const Adjoint& adj,
                                                                 const ProgramLoopGrad<C>& grad) {
    for (int64_t j = s.template first_of<B>(i); j <= i; ++j) {
      const Phase& phase = s.phases[j];
      const RowRange part = s.part(phase.query);
      ask_back(trace, phase, part, k, adj, grad);
      through_classifier(trace, k, part, adj, !blind_to_shift(phase.oracle));
    }
  }

  // adj.gz of one oracle of a joint step.
  __host__ __device__ KERNELMETA_NOINLINE void ask_back(const ProgramTrace<C>& trace, const Phase& phase,
                                                        RowRange part, int64_t k, const Adjoint& adj,
                                                        const ProgramLoopGrad<C>& grad) {
    const int64_t ld = s.ld();
    classify(trace, k, part);
    ask(phase, part, one());
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      const C* from = adj.gg + n * ld + part.first;
      row.part(part.first, part.count).each([&](auto q) {
        q.store(g + n * part.ld(), q.load(from) * C(phase.weight));
      });
    });
    ask_backward(phase, part, one(), g, adj, grad);
  }

 private:
  KERNELMETA_INLINE static int64_t mlp_size(const ProgramShape& s) {
    Sizes sizes = s.mlp(0);
    sizes.Q = s.mlp_ld();
    Arena<C> count;
    typename Mlp<B>::Activations unused(count, sizes, true);
    return count.used();
  }
  KERNELMETA_INLINE int64_t pairs_size(const ProgramShape& s) const {
    Arena<C> count;
    PairInputs<B> unused(count, block, s.N, s.uses_support && s.S > s.Q ? s.S : s.Q);
    return count.used();
  }

  KERNELMETA_INLINE static Mlp<B> mlp_in(B& block, const Sizes& sizes, const FoldedMlp<C>& weights,
                                         C* memory) {
    Arena<C> arena(memory);
    return Mlp<B>(block, sizes, weights, true, arena);
  }
  KERNELMETA_INLINE static PairInputs<B> pairs_in(B& block, int64_t N, int64_t rows, C* memory) {
    Arena<C> arena(memory);
    return PairInputs<B>(arena, block, N, rows);
  }
  KERNELMETA_INLINE PairInputs<B>& pairs(const Phase& phase) {
    return phase.query ? query_pairs : support_pairs;
  }
  KERNELMETA_INLINE Mlp<B>& mlp(const Phase& phase) { return phase.query ? query_mlp : support_mlp; }

  // ---- linear

  __host__ __device__ KERNELMETA_NOINLINE void linear_step(const ProgramTrace<C>& trace, RowRange part,
                                                           RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k];
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld;
      const C *u = trace.u + at, *ag = trace.ag + at;
      row.each([&](auto q) { q.store(trace.u + at + N * ld, q.load(u) - q.load(ag) * rate); });
      if (trace.p) {
        move_coefficients(LiveRow(row, part, others), trace.p + at, g + n * part.ld(), C(1), rate,
                          trace.p + at + N * ld);
      }
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void linear_backward(const ProgramTrace<C>& trace, RowRange part,
                                                               int64_t k, const Adjoint& adj, const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k];
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C *ag = trace.ag + (k * N + n) * ld, *gu = adj.gu + n * ld;
      C grate = -row.sum([&](auto q) { return q.load(gu) * q.load(ag); });
      row.each([&](auto q) { q.store(adj.gag + (k * N + n) * ld, q.load(gu) * -rate); });
      const auto of_part = row.part(part.first, part.count);
      C* gg = adj.gg + n * part.ld();
      if (adj.gp) {
        const C *gp = adj.gp + n * ld + part.first, *gn = gs + n * part.ld();
        grate -= of_part.sum([&](auto q) { return q.load(gp) * q.load(gn); });
        of_part.each([&](auto q) { q.store(gg, q.load(gp) * -rate); });
      } else {
        of_part.each([&](auto q) { q.store(gg, q.zero()); });
      }
      row.one([&] { adj.grate[n] = grate; });
    });
  }

  // ---- cosine

  // Class n before step k, whose G is gs [N][part.ld()].
  KERNELMETA_INLINE StepFrom<C> state(const ProgramTrace<C>& trace, RowRange part, int64_t k, int64_t n,
                                      const C* gs) const {
    const int64_t ld = s.ld(), i = k * s.N + n;
    return {with.rates[k] * with.scale,
            trace.r2[i],
            trace.u + i * ld,
            trace.ag + i * ld,
            gs + n * part.ld(),
            trace.a ? trace.a + i : nullptr,
            trace.p ? trace.p + i * ld : nullptr};
  }

  KERNELMETA_INLINE StepAdjoint<C> adjoint_of(RowRange part, int64_t k, int64_t n, const Adjoint& adj) const {
    const int64_t ld = s.ld(), i = n * ld;
    return {adj.gr2 + n,
            adj.gu + i,
            adj.gp ? adj.ga + n : nullptr,
            adj.gp ? adj.gp + i : nullptr,
            adj.gg + n * part.ld(),
            adj.gag + (k * s.N + n) * ld};
  }

  __host__ __device__ KERNELMETA_NOINLINE void step(const ProgramTrace<C>& trace, RowRange part,
                                                    RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      cosine_step<B>(LiveRow(row, part, others), state(trace, part, k, n, g),
                     {trace.r2 + i, trace.u + i * ld, errors + 2 * n, trace.lost + n,
                      trace.a ? trace.a + i : nullptr, trace.p ? trace.p + i * ld : nullptr});
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void step_backward(const ProgramTrace<C>& trace, RowRange part,
                                                             RowRange others, int64_t k, const Adjoint& adj,
                                                             const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C ge = cosine_step_backward<B>(LiveRow(row, part, others), state(trace, part, k, n, gs),
                                           adjoint_of(part, k, n, adj));
      row.one([&] {
        adj.gscale.add(n, with.rates[k] * ge);
        adj.grate[n] = with.scale * ge;
      });
    });
  }

  // ---- euclidean

  __host__ __device__ KERNELMETA_NOINLINE void step_of_distances(const ProgramTrace<C>& trace, RowRange part,
                                                                 RowRange others, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t i = (k + 1) * N + n;
      euclidean_step(LiveRow(row, part, others), state(trace, part, k, n, g),
                     {trace.r2 + i, trace.u + i * ld, nullptr, nullptr, trace.a ? trace.a + i : nullptr,
                      trace.p ? trace.p + i * ld : nullptr});
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void backward_of_distances(const ProgramTrace<C>& trace,
                                                                     RowRange part, RowRange others,
                                                                     int64_t k, const Adjoint& adj,
                                                                     const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    block.rows(N, ld, [&](int64_t n, auto row) {
      const C ge = euclidean_step_backward(LiveRow(row, part, others), state(trace, part, k, n, gs),
                                           adjoint_of(part, k, n, adj));
      row.one([&] {
        adj.gscale.add(n, with.rates[k] * ge);
        adj.grate[n] = with.scale * ge;
      });
    });
  }

  // ---- soft assignment

  // Scalars of one step and one class. `a` marks the classifier at the start of the phase.
  struct Assignment {
    C c, m, r, ra, na;  // weight of the anchor, total weight, |theta|, |theta_a|, |theta_a|^2
    C anchored;         // <theta_a, Xhat^T p>
    C along;            // <theta, new>
    C norm2;            // |new|^2
    C with_anchor;      // <new, theta_a>
    C next_r2;
    C terms;  // that it is the sum of, squared

    template <class Row>
    KERNELMETA_INLINE Assignment(const ProgramTrace<C>& t, const ProgramShape& s, C weight, C rate,
                                 Row of_part, RowRange part, int64_t start, int64_t k, int64_t n,
                                 const C* p) {
      const int64_t N = s.N, ld = s.ld();
      const C* u = t.u + (k * N + n) * ld + part.first;
      const C* ua = t.u + (start * N + n) * ld + part.first;
      const C* ap = t.ag + (k * N + n) * ld + part.first;
      const C r2 = t.r2[k * N + n];
      na = t.r2[start * N + n];
      r = B::sqrt(r2);
      ra = B::sqrt(na);
      const C sum = of_part.sum([&](auto q) { return q.load(p); });
      c = anchor_weight(weight, sum);
      m = c + sum;
      anchored = ra * of_part.sum([&](auto q) { return q.load(p) * q.load(ua); });
      const C pu = r * of_part.sum([&](auto q) { return q.load(p) * q.load(u); });
      const C pap = of_part.sum([&](auto q) { return q.load(p) * q.load(ap); });
      const C anchor = k == start ? na : t.anchor[k * N + n];
      along = (c * anchor + pu) / m;
      norm2 = (c * c * na + 2 * c * anchored + pap) / (m * m);
      with_anchor = (c * na + anchored) / m;
      const C kept = C(1) - rate;
      next_r2 = kept * kept * r2 + 2 * rate * kept * along + rate * rate * norm2;
      const C sizes = of_part.sum([&](auto q) {
        const auto of_row = q.load(p) * q.load(ap);
        return B::max(of_row, of_row * C(-1));
      });
      terms = kept * kept * r2 +
              rate * rate * (c * c * na + 2 * c * B::max(anchored, -anchored) + sizes) / (m * m);
    }
  };

  __host__ __device__ KERNELMETA_NOINLINE void assignment_step(const ProgramTrace<C>& trace, RowRange part,
                                                               int64_t start, int64_t k) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld, at_a = (start * N + n) * ld, next = at + N * ld;
      const C* p = g + n * part.ld();
      const auto of_part = row.part(part.first, part.count);
      const Assignment v(trace, s, with.class_sizes[n], rate, of_part, part, start, k, n, p);
      const C next_r2 = B::max(v.next_r2, C(kNormFloor) * C(kNormFloor));
      const C inverse = C(1) / B::sqrt(next_r2);
      const C of_u = kept * v.r * inverse, of_a = rate * v.c * v.ra / v.m * inverse,
              of_ap = rate / v.m * inverse;
      row.each([&](auto q) {
        q.store(trace.u + next,
                q.load(trace.u + at) * of_u + q.load(trace.u + at_a) * of_a + q.load(trace.ag + at) * of_ap);
      });
      const bool parallel = nearly_parallel(of_part, trace.u + next + part.first);
      row.one([&] {
        const C anchor = k == start ? v.na : trace.anchor[k * N + n];
        trace.r2[(k + 1) * N + n] = next_r2;
        if (loses<B>(errors + 2 * n, B::sqrt(v.terms / v.next_r2), v.terms, v.next_r2) || parallel)
          trace.lost[n] = 1;
        trace.anchor[(k + 1) * N + n] = kept * anchor + rate * v.with_anchor;
        if (trace.a) {
          trace.a[(k + 1) * N + n] = kept * trace.a[k * N + n] + rate * v.c * trace.a[start * N + n] / v.m;
        }
      });
      if (trace.p) {
        row.each([&](auto q) {
          q.store(trace.p + next, q.load(trace.p + at) * kept + q.load(trace.p + at_a) * (rate * v.c / v.m));
        });
        C* moved = trace.p + next + part.first;
        of_part.each([&](auto q) { q.store(moved, q.load(moved) + q.load(p) * (rate / v.m)); });
      }
    });
  }

  __host__ __device__ KERNELMETA_NOINLINE void assignment_backward(const ProgramTrace<C>& trace,
                                                                   RowRange part, int64_t start, int64_t k,
                                                                   const Adjoint& adj, const C* gs) {
    const int64_t N = s.N, ld = s.ld();
    const C rate = with.rates[k], kept = C(1) - rate;
    block.rows(N, ld, [&](int64_t n, auto row) {
      const int64_t at = (k * N + n) * ld, at_a = (start * N + n) * ld;
      const C *p = gs + n * part.ld(), *u = trace.u + at, *ua = trace.u + at_a, *ap = trace.ag + at;
      C *gu = adj.gu + n * ld, *gra = adj.gra + n * ld, *gap = adj.gag + at, *gg = adj.gg + n * part.ld();
      const auto of_part = row.part(part.first, part.count);
      const Assignment v(trace, s, with.class_sizes[n], rate, of_part, part, start, k, n, p);
      const C floor2 = C(kNormFloor) * C(kNormFloor);
      const bool floored = !(v.next_r2 > floor2);
      const C next_r2 = floored ? floor2 : v.next_r2;
      const C anchor = k == start ? v.na : trace.anchor[k * N + n];
      const C r2 = trace.r2[k * N + n], share = v.c / v.m;
      const C inverse = C(1) / B::sqrt(next_r2);
      // gR' = gU' / r'; with T = (c R_a + A p) / m the state is R' = kept R + rate T.
      const C gu_u = row.sum([&](auto q) { return q.load(gu) * q.load(u); }) * inverse;
      const C gu_ua = row.sum([&](auto q) { return q.load(gu) * q.load(ua); }) * inverse;
      const C gu_ap = row.sum([&](auto q) { return q.load(gu) * q.load(ap); }) * inverse;
      const C gt_t = (v.c * v.ra * gu_ua + gu_ap) / v.m;  // <gR', T>
      const C gu_next = kept * v.r * gu_u + rate * gt_t;  // <gR', R'>
      const C gnext = floored ? C(0) : adj.gr2[n] - gu_next / (2 * next_r2);
      const C ganchor = adj.ganchor[n];
      C grate = gt_t - v.r * gu_u + ganchor * (v.with_anchor - anchor) +
                gnext * (2 * (C(1) - 2 * rate) * v.along - 2 * kept * r2 + 2 * rate * v.norm2);
      const C galong = 2 * rate * kept * gnext, gnorm2 = rate * rate * gnext, gwith = rate * ganchor;
      C gm = -(rate * gt_t + 2 * gnorm2 * v.norm2 + galong * v.along + gwith * v.with_anchor) / v.m;
      const C ganchored = (2 * gnorm2 * share + gwith) / v.m;
      const C gpap = gnorm2 / (v.m * v.m);
      if (adj.gp) {
        const C *gp = adj.gp + n * ld, *pa = trace.p + at_a, *pk = trace.p + at;
        const C gp_p = of_part.sum([&](auto q) { return q.load(gp + part.first) * q.load(p); });
        const C gp_pa = row.sum([&](auto q) { return q.load(gp) * q.load(pa); });
        const C gp_pk = row.sum([&](auto q) { return q.load(gp) * q.load(pk); });
        const C moved = (v.c * gp_pa + gp_p) / v.m;
        const C a_moved = share * trace.a[start * N + n] * adj.ga[n];
        grate += moved - gp_pk + a_moved - trace.a[k * N + n] * adj.ga[n];
        gm -= rate * (moved + a_moved) / v.m;
      }
      of_part.each([&](auto q) {
        const int64_t o = part.first;
        auto value = q.load(ua + o) * (ganchored * v.ra) + q.load(ap + o) * gpap +
                     q.load(u + o) * (galong * v.r / v.m) + gm;
        if (adj.gp) value = value + q.load(adj.gp + n * ld + o) * (rate / v.m);
        q.store(gg, value);
      });
      row.each([&](auto q) {
        const auto gr = q.load(gu) * inverse;
        q.store(gap, gr * (rate / v.m));
        q.store(gra, q.load(gra) + gr * (rate * share));
        q.store(gu, gr * kept);  // of R
      });
      of_part.each([&](auto q) {
        const int64_t o = part.first;
        q.store(gap + o, q.load(gap + o) + q.load(p) * gpap);
        q.store(gra + o, q.load(gra + o) + q.load(p) * ganchored);
        q.store(gu + o, q.load(gu + o) + q.load(p) * (galong / v.m));
      });
      if (adj.gp) {
        C *gp = adj.gp + n * ld, *gpa = adj.gpa + n * ld;
        row.each([&](auto q) {
          q.store(gpa, q.load(gpa) + q.load(gp) * (rate * share));
          q.store(gp, q.load(gp) * kept);
        });
        row.one([&] {
          adj.gaa[n] += rate * share * adj.ga[n];
          adj.ga[n] *= kept;
        });
      }
      const C gr_u = row.sum([&](auto q) { return q.load(gu) * q.load(u); });
      row.each([&](auto q) { q.store(gu, q.load(gu) * v.r); });
      row.one([&] {
        adj.gna[n] += gnorm2 * share * share + gwith * share;
        adj.ganchor[n] = kept * ganchor + galong * share;
        adj.gr2[n] = kept * kept * gnext + gr_u / (2 * v.r);
        adj.grate[n] = grate;
      });
    });
  }

  KERNELMETA_INLINE void clear_anchor(const Adjoint& adj) {
    const int64_t ld = s.ld();
    block.unfenced().rows(s.N, ld, [&](int64_t n, auto row) {
      row.one([&] { adj.ganchor[n] = adj.gna[n] = adj.gaa[n] = 0; });
      row.each([&](auto q) {
        q.store(adj.gra + n * ld, q.zero());
        if (adj.gpa) q.store(adj.gpa + n * ld, q.zero());
      });
    });
  }

  // What the steps of a phase asked of its anchor, which is the state at its start.
  KERNELMETA_INLINE void through_anchor(const ProgramTrace<C>& trace, int64_t start, const Adjoint& adj) {
    const int64_t N = s.N, ld = s.ld();
    block.unfenced().rows(N, ld, [&](int64_t n, auto row) {
      const C *u = trace.u + (start * N + n) * ld, *gra = adj.gra + n * ld;
      C* gu = adj.gu + n * ld;
      const C r = B::sqrt(trace.r2[start * N + n]);
      const C along = row.sum([&](auto q) { return q.load(gra) * q.load(u); });
      row.each([&](auto q) { q.store(gu, q.load(gu) + q.load(gra) * r); });
      row.one([&] {
        adj.gr2[n] += adj.ganchor[n] + adj.gna[n] + along / (2 * r);
        if (adj.ga) adj.ga[n] += adj.gaa[n];
      });
      if (adj.gp) {
        row.each(
            [&](auto q) { q.store(adj.gp + n * ld, q.load(adj.gp + n * ld) + q.load(adj.gpa + n * ld)); });
      }
    });
  }
};

}  // namespace kernelmeta
