// What a program is, and what its forward pass keeps: sizes, phases, trace, parameters and their gradients.
// program.h says what is done with them.
#pragma once

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
  double relax = 1;               // how nearly T keeps to them, see marginals.h

  KERNELMETA_INLINE double tau() const { return (1 - relax) / relax; }
};

// One task's sizes, and the program.
struct ProgramShape {
  int64_t S, Q, N, D, H;
  const Phase* phases;
  int64_t n_phases;
  int64_t K;  // steps of all phases
  bool cosine;
  bool uses_support, uses_query;  // some phase does
  bool coefficients;              // P and a are wanted
  bool pairs;                     // the MLP is that of the equivariant gradient
  bool shares;                    // some phase knows the classes' shares of the rows

  KERNELMETA_INLINE RowRange support() const { return {0, uses_support ? S : 0}; }
  KERNELMETA_INLINE RowRange query() const { return {support().ld(), Q}; }
  KERNELMETA_INLINE RowRange part(bool of_query) const { return of_query ? query() : support(); }
  KERNELMETA_INLINE int64_t ld() const { return query().first + query().ld(); }
  KERNELMETA_INLINE int64_t widest() const {
    return support().ld() > query().ld() ? support().ld() : query().ld();
  }
  // Where the G of phase i's first step stands among those of all steps, [N][its part's ld] each.
  KERNELMETA_INLINE int64_t packed(int64_t i) const {
    int64_t elements = 0;
    for (int64_t j = 0; j < i; ++j) elements += phases[j].steps * N * part(phases[j].query).ld();
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
  C* inverse;                    // [ld]          1 / |x|; cosine only, like r2, a and mass
  C* r2;                         // [K+1][N]
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
        r2(s.cosine ? arena.take((s.K + 1) * s.N) : nullptr),
        u(arena.take((s.K + 1) * s.N * s.ld())),
        ag(arena.take(s.K * s.N * s.ld())),
        gram_support(s.uses_support ? arena.take(s.S * s.ld()) : nullptr),
        gram_query(s.uses_query ? arena.take(s.Q * s.ld()) : nullptr),
        anchor(s.cosine ? arena.take((s.K + 1) * s.N) : nullptr),
        lost(s.cosine ? arena.take(s.N) : nullptr),
        a(s.coefficients && s.cosine ? arena.take((s.K + 1) * s.N) : nullptr),
        p(s.coefficients ? arena.take((s.K + 1) * s.N * s.ld()) : nullptr) {}

  KERNELMETA_INLINE C* gram(bool of_query) const { return of_query ? gram_query : gram_support; }
};

// What the phases read besides the state; pointers may be null where no phase needs them.
template <class C>
struct ProgramParameters {
  C scale, bias;   // cosine: Z = scale (U + bias); linear: 1 and 0
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
