// A program: phases of steps that refine one task's classifier, in the space of its rows, and the adjoint.
//
// The live rows are the query rows and, where a phase uses them, the support rows. The classifier theta moves
// in the span of its start and of the normalised rows (cosine) or of the rows (linear), so its state is what
// it says about the live rows. With A the Gram matrix and G what the phase's oracle gives for the phase's
// rows, a step of rate lr is
//
//   linear   Z  = X W^T + b              Z' = Z - lr (A + 1) G             W = W0 + P^T X, b = b0 + sum(P)
//                                        P' = P - lr G
//   dot      Z  = X W^T                  Z' = Z - lr A G, P' = P - lr G    W = W0 + P^T X
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

#include "engine/program_steps.h"

namespace kernelmeta {

template <class B>
struct ProgramLoop : ProgramSteps<B> {
  using C = typename B::Scalar;
  using Adjoint = ProgramAdjoint<B>;
  using Steps = ProgramSteps<B>;
  using Steps::ask, Steps::ask_backward;
  using Steps::assignment_step, Steps::assignment_backward, Steps::clear_anchor, Steps::through_anchor;
  using Steps::block, Steps::s, Steps::with, Steps::z, Steps::g, Steps::errors;
  using Steps::linear_step, Steps::linear_backward, Steps::step, Steps::step_backward;
  using Steps::step_of_distances, Steps::backward_of_distances;
  using Steps::Steps;

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
    } else if (s.template by_distance<B>() && trace.a) {
      block.unfenced().each_item(N, [&](int64_t n) { trace.a[n] = C(1); });
    }
    int64_t k = 0;
    for (int64_t i = 0; i < s.n_phases; ++i) {
      const Phase& phase = s.phases[i];
      const int64_t start = k;
      for (const int64_t end = k + phase.steps; k < end; ++k) {
        const RowRange part = s.template driving<B>(i);
        C* ag = trace.ag + k * N * ld;
        if (s.template is_joint<B>(i)) {
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
          step(trace, part, s.template others<B>(i), k);
        else if (s.template by_distance<B>())
          step_of_distances(trace, part, s.template others<B>(i), k);
        else
          linear_step(trace, part, s.template others<B>(i), k);
        if (s.template is_joint<B>(i) && s.cosine) look_for_parallels(trace, i, k);
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
    const Shift shift = shift_before(trace, s.K);
    block.unfenced().each_item(s.Q * ways, [&](int64_t i) {
      const int64_t n = i % ways;
      out[i] = n < N ? scale * (u[n * ld + i / ways] + shift(n)) : -C(__builtin_inff());
    });
  }

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
        const RowRange part = s.template driving<B>(i);
        C* gs = adj.gs + s.template packed<B>(i) + (k - start) * N * part.ld();
        const C* gag = adj.gag + k * N * ld;
        if (s.template is_joint<B>(i)) {
          ask_together(trace, i, k, gs);
        } else {
          classify(trace, k, part);
          ask(phase, part, gs);
        }
        if (assigns)
          assignment_backward(trace, part, start, k, adj, gs);
        else if (s.cosine)
          step_backward(trace, part, s.template others<B>(i), k, adj, gs);
        else if (s.template by_distance<B>())
          backward_of_distances(trace, part, s.template others<B>(i), k, adj, gs);
        else
          linear_backward(trace, part, k, adj, gs);
        add_rate(k, adj, grad);
        if (with.first_order) continue;
        if (s.template is_joint<B>(i)) {
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
        ask_backward(phase, part, gs, adj, grad);
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

  // What is added to the U of each class.
  struct Shift {
    C bias;
    const C* r2;  // by distances; else null

    KERNELMETA_INLINE C operator()(int64_t n) const { return B::kJointSteps && r2 ? r2[n] * C(-0.5) : bias; }
  };
  KERNELMETA_INLINE Shift shift_before(const ProgramTrace<C>& trace, int64_t k) const {
    return {with.bias, s.template by_distance<B>() ? trace.r2 + k * s.N : nullptr};
  }

  // z = scale (U + shift) of one part, before step k.
  KERNELMETA_INLINE void classify(const ProgramTrace<C>& trace, int64_t k, RowRange part) {
    const int64_t ld = s.ld();
    const C* u = trace.u + k * s.N * ld;
    const Shift shift = shift_before(trace, k);
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      const C* from = u + n * ld + part.first;
      const C own = shift(n);
      row.part(part.first, part.count).each([&](auto q) {
        q.store(z + n * part.ld(), (q.load(from) + own) * with.scale);
      });
    });
  }

  // adj.gz, the gradient of a part's z = scale (U + shift) before step k, goes into gu, gscale and gbias or
  // gr2. shifts: whether its sum over the classes is more than rounding.
  KERNELMETA_INLINE void through_classifier(const ProgramTrace<C>& trace, int64_t k, RowRange part,
                                            const Adjoint& adj, bool shifts = true) {
    const int64_t ld = s.ld();
    const C* u = trace.u + k * s.N * ld;
    const Shift shift = shift_before(trace, k);
    block.rows(s.N, ld, [&](int64_t n, auto row) {
      const C *gz = adj.gz + n * part.ld(), *un = u + n * ld + part.first;
      C* gu = adj.gu + n * ld + part.first;
      const auto of_part = row.part(part.first, part.count);
      if (s.template has_length<B>()) {
        const C sum = of_part.sum([&](auto q) { return q.load(gz); });
        const C along = of_part.sum([&](auto q) { return q.load(gz) * q.load(un); });
        row.one([&] {
          adj.gscale.add(n, along);
          if (!shifts && s.cosine) return;
          adj.gscale.add(n, shift(n) * sum);
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
      if (!s.template drive<B>(of_query, i)) continue;
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
        if (!s.template drive<B>(of_query, i)) continue;
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
      if (!s.template drive<B>(of_query, i)) continue;
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
    ask_backward(phase, part, one(), adj.with_gg(g), grad);
  }
};

}  // namespace kernelmeta
