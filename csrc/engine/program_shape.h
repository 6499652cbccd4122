// What a program is, and what its forward pass keeps: sizes, phases, trace, parameters and their gradients.
// program.h says what is done with them.
#pragma once

#include "engine/class_sums.h"
#include "engine/inner_loop.h"
#include "engine/marginals.h"
#include "engine/oracles.h"
#include "engine/pair_inputs.h"

namespace kernelmeta {

struct Phase {
  Oracle oracle;
  bool query;  // uses the query rows; else the support rows
  bool mean;   // the loss is the mean over the rows; else their sum
  int64_t steps;
  Shares shares = Shares::kNone;  // of the rows, that the classes have
  double number = 1;  // relax, how nearly T keeps to the shares; of entropies alpha. See marginals.h
  // Of a joint step, whose G is the sum of several oracles', each times its weight. They stand one after the
  // other; all but the last, which has the steps, join the next one.
  double weight = 1;
  bool joins = false;

  KERNELMETA_INLINE double tau() const { return (1 - number) / number; }
  // Whether it is an entropy that marginals.h has the G of.
  KERNELMETA_INLINE bool is_entropy() const {
    return oracle == Oracle::kMarginalEntropy || (oracle == Oracle::kEntropy && number != 1);
  }
  // Whether marginals.h has its G.
  template <class B>
  KERNELMETA_INLINE bool looks_at_means() const {
    return shares != Shares::kNone || (B::kJointSteps && is_entropy());
  }
  // ... where it has: whether that is because of shares.
  template <class B>
  KERNELMETA_INLINE bool knows_shares() const {
    return !B::kJointSteps || shares != Shares::kNone;
  }
  // Whether only Blocks with kJointSteps take it.
  KERNELMETA_INLINE bool wants_joint_steps() const { return joins || weight != 1 || is_entropy(); }
};

// One task's sizes, and the program.
struct ProgramShape {
  int64_t S, Q, N, D, H;
  const Phase* phases;
  int64_t n_phases;
  int64_t K;                      // steps of all phases
  bool cosine, euclidean;         // neither: linear
  bool uses_support, uses_query;  // some phase does
  bool coefficients;              // P and a are wanted
  bool pairs;                     // the MLP is that of the equivariant gradient
  bool means;                     // some phase looks at means of predictions, see marginals.h
  bool joint;                     // some steps are joint

  template <class B>
  KERNELMETA_INLINE bool by_distance() const {
    return B::kJointSteps && euclidean;
  }
  // Whether |theta|^2 and a are part of the state.
  template <class B>
  KERNELMETA_INLINE bool has_length() const {
    return cosine || by_distance<B>();
  }
  template <class B>
  KERNELMETA_INLINE bool some_joint() const {
    return B::kJointSteps && joint;
  }
  KERNELMETA_INLINE RowRange support() const { return {0, uses_support ? S : 0}; }
  KERNELMETA_INLINE RowRange query() const { return {support().ld(), Q}; }
  KERNELMETA_INLINE RowRange part(bool of_query) const { return of_query ? query() : support(); }
  KERNELMETA_INLINE int64_t ld() const { return query().first + query().ld(); }
  KERNELMETA_INLINE int64_t widest() const {
    return support().ld() > query().ld() ? support().ld() : query().ld();
  }
  // Whether phase i's steps are joint ones: then G is of all live rows. Its oracles begin with `first_of(i)`.
  template <class B>
  KERNELMETA_INLINE bool is_joint(int64_t i) const {
    return B::kJointSteps && (phases[i].weight != 1 || first_of<B>(i) < i);
  }
  template <class B>
  KERNELMETA_INLINE int64_t first_of(int64_t i) const {
    if constexpr (B::kJointSteps) {
      while (i > 0 && phases[i - 1].joins) --i;
    }
    return i;
  }
  // Whether an oracle of phase i's steps looks at the rows of one kind.
  template <class B>
  KERNELMETA_INLINE bool drive(bool of_query, int64_t i) const {
    bool found = phases[i].query == of_query;
    if constexpr (B::kJointSteps) {
      for (int64_t j = first_of<B>(i); j < i; ++j) found = found || phases[j].query == of_query;
    }
    return found;
  }
  // The rows of phase i's G, with what lies between them.
  template <class B>
  KERNELMETA_INLINE RowRange driving(int64_t i) const {
    return is_joint<B>(i) ? RowRange{0, query().first + Q} : part(phases[i].query);
  }
  template <class B>
  KERNELMETA_INLINE RowRange others(int64_t i) const {
    return is_joint<B>(i) ? RowRange{0, 0} : part(!phases[i].query);
  }
  template <class B>
  KERNELMETA_INLINE int64_t widest_step() const {
    return some_joint<B>() ? ld() : widest();
  }
  // Where in phase i's G, of the rows `driving`, those of one kind begin that drive it.
  template <class B>
  KERNELMETA_INLINE int64_t first_in_g(bool of_query, int64_t i) const {
    return is_joint<B>(i) ? part(of_query).first : 0;
  }
  // The most rows that a phase takes the mean prediction of.
  template <class B>
  KERNELMETA_INLINE int64_t rows_of_means() const {
    return B::kJointSteps && uses_support && S > Q ? S : Q;
  }
  // Where the G of phase i's first step stands among those of all steps, [N][ld of its rows] each.
  template <class B>
  KERNELMETA_INLINE int64_t packed(int64_t i) const {
    int64_t elements = 0;
    for (int64_t j = 0; j < i; ++j) elements += phases[j].steps * N * driving<B>(j).ld();
    return elements;
  }
  // The MLP's, on so many rows.
  KERNELMETA_INLINE Sizes mlp(int64_t rows) const {
    return pairs ? pair_sizes(rows, N, D, H, K) : Sizes{1, S, rows, N, D, H, K};
  }
  // Of its activations, for any rows.
  KERNELMETA_INLINE int64_t mlp_ld() const {
    const int64_t of_support = mlp(uses_support ? S : 0).ld(), of_query = mlp(Q).ld();
    return of_support > of_query ? of_support : of_query;
  }
};

// What the forward pass leaves for the backward pass, one task; its size stands in
// kernelmeta/ops/program_op.py. It starts as zeros.
template <class C>
struct ProgramTrace {
  C* theta0;                     // [N][D]        where the start is the class means
  C* inverse;                    // [ld]          1 / |x|; cosine only
  C* r2;                         // [K+1][N]      not linear; like a
  C* u;                          // [K+1][N][ld]  U, or Z
  C* ag;                         // [K][N][ld]    A G
  C *gram_support, *gram_query;  // [S][ld], [Q][ld]: rows of A (+ 1 if linear), for the parts in use
  C* anchor;                     // [K+1][N]      <theta, theta_a>; soft assignment
  C* lost;   // [N]           not zero: the task was done anew in D dimensions; cosine only
  C *a, *p;  // [K+1][N], [K+1][N][ld]: with coefficients only

  ProgramTrace() = default;
  KERNELMETA_INLINE ProgramTrace(Arena<C>& arena, const ProgramShape& s, bool class_means)
      : theta0(class_means ? arena.take(s.N * s.D) : nullptr),
        inverse(s.cosine ? arena.take(s.ld()) : nullptr),
        r2((s.cosine || s.euclidean) ? arena.take((s.K + 1) * s.N) : nullptr),
        u(arena.take((s.K + 1) * s.N * s.ld())),
        ag(arena.take(s.K * s.N * s.ld())),
        gram_support(s.uses_support ? arena.take(s.S * s.ld()) : nullptr),
        gram_query(s.uses_query ? arena.take(s.Q * s.ld()) : nullptr),
        anchor(s.cosine ? arena.take((s.K + 1) * s.N) : nullptr),
        lost(s.cosine ? arena.take(s.N) : nullptr),
        a(s.coefficients && (s.cosine || s.euclidean) ? arena.take((s.K + 1) * s.N) : nullptr),
        p(s.coefficients ? arena.take((s.K + 1) * s.N * s.ld()) : nullptr) {}

  KERNELMETA_INLINE C* gram(bool of_query) const { return of_query ? gram_query : gram_support; }
};

// Scratch of the backward pass of one task.
template <class B>
struct ProgramAdjoint {
  using C = typename B::Scalar;

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

  KERNELMETA_INLINE ProgramAdjoint(Arena<C>& arena, const ProgramShape& s)
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

  // The same, with another gradient of G.
  KERNELMETA_INLINE ProgramAdjoint with_gg(C* other) const {
    ProgramAdjoint adj = *this;
    adj.gg = other;
    return adj;
  }
};

// What the phases read besides the state; pointers may be null where no phase needs them.
template <class C>
struct ProgramParameters {
  C scale, bias;   // Z = scale (U + bias), bias 0 if Euclidean; linear: 1 and 0
  C target;        // of squared error
  const C* rates;  // [K]
  const FoldedMlp<C>* mlp;
  const C* y;            // [N][padded(S)] one-hot support labels
  const C* class_sizes;  // [N] support rows of each class
  bool first_order;      // steps are constants (linear only)
  const C* proportions;  // [bags][proportions_ld], the given shares; or null
  int64_t proportions_ld, bags;
  const int64_t* bag_offsets;  // [bags + 1], of the query rows; null: one bag
};

// Gradients of the parameters, added to.
template <class C>
struct ProgramLoopGrad {
  C *scale, *bias, *target;  // [1] each
  C* rates;                  // [K]
  const FoldedMlpGrad<C>* mlp;
  C* proportions;  // [bags][proportions_ld] or null
};

}  // namespace kernelmeta
