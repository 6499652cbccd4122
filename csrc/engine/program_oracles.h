// What a program asks its oracles for a phase's rows: G of their logits, and its adjoint.
#pragma once

#include "engine/program_shape.h"

namespace kernelmeta {

// The memory of a loop's steps, and what answers.
template <class B>
struct ProgramOracles {
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

  KERNELMETA_INLINE ProgramOracles(B& block, const ProgramShape& s, const ProgramParameters<C>& with,
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
        marginals(arena, block, s.means ? s.N : 0, s.rows_of_means<B>()) {}
  ProgramOracles(const ProgramOracles&) = delete;

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
    return C(phase.knows_shares<B>() ? phase.tau() : phase.number);
  }

  // adj.gz = (dG/dz)^T adj.gg; after ask(phase, part, gs).
  __host__ __device__ KERNELMETA_NOINLINE void ask_backward(const Phase& phase, RowRange part, const C* gs,
                                                            const ProgramAdjoint<B>& adj,
                                                            const ProgramLoopGrad<C>& grad) {
    if (phase.oracle == Oracle::kSyntheticGradient) {
      if (phase.mean) scale_rows(adj.gg, part, C(1) / C(part.count));
      mlp(phase).backward(z, adj.gg, adj.gz, adj.gh, *grad.mlp);
      return;
    }
    if (phase.oracle == Oracle::kEquivariantGradient) {
      PairInputs<B>& of_pairs = pairs(phase);
      if (phase.mean) scale_rows(adj.gg, part, C(1) / C(part.count));
      of_pairs.put_in(adj.gg);
      mlp(phase).backward(of_pairs.x, of_pairs.out, of_pairs.gx, adj.gh, *grad.mlp);
      of_pairs.backward(z, adj.gz);
      return;
    }
    if (phase.looks_at_means<B>()) {
      each_bag(phase, part, grad.proportions, [&](const auto& bag, C share) {
        marginals.backward(phase.oracle, bag, of_marginals(phase), share, z, gs, adj.gg, adj.gz);
      });
      clear_padding(part, adj.gz);
      return;
    }
    const OracleRows<B> rows = oracle_rows(phase, part);
    if (phase.oracle == Oracle::kSquaredError) {
      block.unfenced().rows(s.N, s.ld(), [&](int64_t n, auto row) {
        const int64_t i = n * part.ld();
        const C along = row.part(part.first, part.count).sum([&](auto q) {
          return q.load(rows.y + i) * q.load(adj.gg + i);
        });
        row.one([&] { adj.gtarget.add(n, -along * rows.share); });
      });
    }
    with_oracle(phase.oracle, [&](auto oracle) { oracle.backward(rows, z, gs, adj.gg, adj.gz); });
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
    const bool knows = phase.knows_shares<B>();
    // (What is asked anew at each turn keeps the loop from being unrolled.)
    for (int64_t b = 0; b < (knows ? with.bags : 1); ++b) {
      const int64_t* offsets = knows ? with.bag_offsets : nullptr;
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
};

}  // namespace kernelmeta
