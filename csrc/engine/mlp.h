// The synthetic-gradient MLP on the rows of one task: Linear - ReLU - normalise, twice, then Linear.
//
// BatchNorm's gain and shift belong to the linear layer that follows (fold.h does that once a call),
// so here "normalise" is (a - mean) / std alone. Query rows are innermost: every activation is [units][ld].
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

inline constexpr double kNormEps = 1e-5;

// Weights with gain and shift folded in; see fold.h. mean/istd are null when the statistics are the task's
// own.
template <class C>
struct FoldedMlp {
  C* w1;     // [H, N]
  C* b1;     // [H]
  C* w2;     // [H, H]
  C* b2;     // [H]
  C* w3;     // [outputs, H]
  C* b3;     // [outputs]
  C* mean1;  // [H]
  C* istd1;  // [H]
  C* mean2;  // [H]
  C* istd2;  // [H]

  FoldedMlp() = default;
  template <class S>
  KERNELMETA_INLINE FoldedMlp(Arena<C>& arena, const S& s, bool fixed_stats)
      : w1(arena.take(s.H * s.N)),
        b1(arena.take(s.H)),
        w2(arena.take(s.H * s.H)),
        b2(arena.take(s.H)),
        w3(arena.take(s.outputs() * s.H)),
        b3(arena.take(s.outputs())),
        mean1(fixed_stats ? arena.take(s.H) : nullptr),
        istd1(fixed_stats ? arena.take(s.H) : nullptr),
        mean2(fixed_stats ? arena.take(s.H) : nullptr),
        istd2(fixed_stats ? arena.take(s.H) : nullptr) {}
};

// Gradients of the folded weights, summed over steps and tasks. w1 and w3 are stored hidden units innermost.
template <class C>
struct FoldedMlpGrad {
  C* w1t;  // [N, padded(H)]
  C* b1;   // [H]
  C* w2;   // [H, padded(H)]
  C* b2;   // [H]
  C* w3;   // [outputs, padded(H)]
  C* b3;   // [outputs]

  template <class S>
  KERNELMETA_INLINE FoldedMlpGrad(Arena<C>& arena, const S& s)
      : w1t(arena.take(s.N * padded(s.H))),
        b1(arena.take(s.H)),
        w2(arena.take(s.H * padded(s.H))),
        b2(arena.take(s.H)),
        w3(arena.take(s.outputs() * padded(s.H))),
        b3(arena.take(s.outputs())) {}
};

// One of the two layers that are normalised: n = (relu(a) - mean) / std per unit, a = w in + bias, over the
// rows of this task or with the statistics given. Arrays of rows are [.][padded(Q)].
template <class C>
struct Layer {
  int64_t units, inputs, Q;
  const C *w, *bias;                 // [units, inputs], [units]
  C *a, *n;                          // [units][.]; the same where a is not wanted
  C* istd;                           // [units], for the backward pass
  const C *fixed_mean, *fixed_istd;  // [units] or null
};

// The way back through it, from the gradient of what follows times w(o, unit).
template <class C>
struct LayerAdjoint {
  int64_t units, outputs, Q;
  const C* w;                          // [outputs, units]
  const C *a, *n, *istd, *fixed_istd;  // of the layer
};

template <class B>
struct Mlp {
  using C = typename B::Scalar;

  // What the backward pass needs of the forward pass. The arrays that `outer` reads are padded in units too.
  // Where no backward pass comes, layers are normalised in place.
  struct Activations {
    C *n1, *n2;              // [padded(H)][ld]: after ReLU and normalisation
    C *a1, *a2;              // [H][ld]: after the linear layer
    C *istd1, *istd2;        // [H]
    C *mean, *along, *kept;  // [H] each, scratch

    KERNELMETA_INLINE Activations(Arena<C>& arena, const typename B::Sizes& s, bool backward)
        : n1(arena.take(padded(s.H) * s.ld())),
          n2(arena.take(padded(s.H) * s.ld())),
          a1(backward ? arena.take(s.H * s.ld()) : n1),
          a2(backward ? arena.take(s.H * s.ld()) : n2),
          istd1(arena.take(s.H)),
          istd2(arena.take(s.H)),
          mean(arena.take(s.H)),
          along(arena.take(s.H)),
          kept(arena.take(s.H)) {}
  };

  B& block;
  const typename B::Sizes& s;
  const FoldedMlp<C>& w;
  Activations act;

  // `backward`: whether backward() will be called.
  KERNELMETA_INLINE Mlp(B& block, const typename B::Sizes& s, const FoldedMlp<C>& w, bool backward,
                        Arena<C>& arena)
      : block(block), s(s), w(w), act(arena, s, backward) {}

  // z [N][ld] -> g [outputs][ld]. Where `stats` [2][2][H] is given it receives mean and unbiased variance per
  // layer.
  KERNELMETA_INLINE void forward(const C* z, C* g, C* stats) {
    const int64_t H = s.H, Q = s.Q, ld = s.ld();
    layer(false, z, stats);
    layer(true, act.n1, stats ? stats + 2 * H : nullptr);
    block.mm(s.outputs(), H, Q, {w.w3, H, 1}, act.n2, ld, g, ld, w.b3);
  }

  // gg [outputs][ld] -> gz [N][ld], from the activations of the last forward(z); adds to `grad`.
  // g2: scratch, [H][ld].
  KERNELMETA_INLINE void backward(const C* z, const C* gg, C* gz, C* g2, const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, outputs = s.outputs(), H = s.H, Q = s.Q, ld = s.ld(), ldh = padded(H);
    C* g1 = act.n2;  // which is read for the last time before g1 is written
    block.unfenced().rows(outputs, Q, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto q) { return q.load(gg + n * ld); });
      row.one([&] { grad.b3[n] += sum; });
    });
    block.unfenced().outer(outputs, H, Q, gg, ld, act.n2, ld, grad.w3, ldh);
    layer_backward(true, gg, g2, grad.b2);
    block.unfenced().outer(H, H, Q, g2, ld, act.n1, ld, grad.w2, ldh);
    layer_backward(false, g2, g1, grad.b1);
    block.unfenced().mm(N, H, Q, {w.w1, 1, N}, g1, ld, gz, ld, nullptr);
    block.outer(N, H, Q, z, ld, g1, ld, grad.w1t, ldh);
  }

  KERNELMETA_INLINE Layer<C> layer_of(bool second) const {
    return second ? Layer<C>{s.H, s.H, s.Q, w.w2, w.b2, act.a2, act.n2, act.istd2, w.mean2, w.istd2}
                  : Layer<C>{s.H, s.N, s.Q, w.w1, w.b1, act.a1, act.n1, act.istd1, w.mean1, w.istd1};
  }
  KERNELMETA_INLINE LayerAdjoint<C> adjoint_of(bool second) const {
    return second ? LayerAdjoint<C>{s.H, s.outputs(), s.Q, w.w3, act.a2, act.n2, act.istd2, w.istd2}
                  : LayerAdjoint<C>{s.H, s.H, s.Q, w.w2, act.a1, act.n1, act.istd1, w.istd1};
  }

 private:
  // Each at once where the block can, else word by word. stats [2][H] or null: receives mean and unbiased
  // variance.
  KERNELMETA_INLINE void layer(bool second, const C* in, C* stats) {
    if constexpr (B::kHasLayers) {
      if (block.layer(*this, second, in, stats)) return;
    }
    layer_by_words(layer_of(second), in, stats);
  }
  __host__ __device__ KERNELMETA_NOINLINE void layer_by_words(const Layer<C>& l, const C* in, C* stats) {
    block.mm(l.units, l.inputs, l.Q, {l.w, l.inputs, 1}, in, s.ld(), l.a, s.ld(), l.bias);
    normalise(l.a, l.n, l.istd, l.fixed_mean, l.fixed_istd, stats);
  }
  // g_out, of what follows -> g, of a; adds the sum over rows to the bias' gradient.
  KERNELMETA_INLINE void layer_backward(bool second, const C* g_out, C* g, C* grad_bias) {
    if constexpr (B::kHasLayers) {
      if (block.layer_backward(*this, second, g_out, g, grad_bias)) return;
    }
    layer_backward_by_words(adjoint_of(second), g_out, g, grad_bias);
  }
  __host__ __device__ KERNELMETA_NOINLINE void layer_backward_by_words(const LayerAdjoint<C>& l,
                                                                       const C* g_out, C* g, C* grad_bias) {
    block.mm(l.units, l.outputs, l.Q, {l.w, 1, l.units}, g_out, s.ld(), g, s.ld(), nullptr);
    through_norm(l.a, l.n, l.istd, l.fixed_istd, g, grad_bias);
  }

  // n = (relu(a) - mean) / std per unit, over the rows of this task or with the statistics given.
  KERNELMETA_INLINE void normalise(const C* a, C* n, C* istd, const C* fixed_mean, const C* fixed_istd,
                                   C* stats) {
    const int64_t H = s.H, Q = s.Q, ld = s.ld();
    if (!fixed_mean) {
      C* own_mean = act.mean;
      // A row's sums are known to the warp that takes it: no barriers.
      block.unfenced().row_sums(H, Q, own_mean,
                                [&](int64_t h, auto q) { return B::relu(q.load(a + h * ld)); });
      block.unfenced().row_items(H, [=](int64_t h) { own_mean[h] /= C(Q); });
      block.unfenced().row_sums(H, Q, istd, [&](int64_t h, auto q) {
        const auto d = B::relu(q.load(a + h * ld)) - own_mean[h];
        return d * d;
      });
      block.unfenced().row_items(H, [=](int64_t h) {
        if (stats) {
          stats[h] = own_mean[h];
          stats[H + h] = istd[h] / C(Q > 1 ? Q - 1 : 1);
        }
        istd[h] = B::inverse_std(istd[h], Q, kNormEps);
      });
    }
    const C *mean = fixed_mean ? fixed_mean : act.mean, *scale = fixed_mean ? fixed_istd : istd;
    block.rows(H, Q, [&](int64_t h, auto row) {
      row.each([&](auto q) { q.store(n + h * ld, (B::relu(q.load(a + h * ld)) - mean[h]) * scale[h]); });
    });
  }

  // In place on g: through the normalisation and the ReLU; adds the sum over rows to the bias' gradient.
  KERNELMETA_INLINE void through_norm(const C* a, const C* n, const C* istd, const C* fixed_istd, C* g,
                                      C* gb) {
    const int64_t H = s.H, Q = s.Q, ld = s.ld();
    // Per unit, over the rows: sum of g n; of what is left of g without its part along n; what passes. The
    // mean of n is rounding, but 1 / std twice, up to 1e5, magnifies it: what is subtracted must be the mean
    // of what there is, or a bias' gradient, whose terms cancel, keeps it.
    C *along = act.along, *across = act.mean, *kept = act.kept;
    const C share = fixed_istd ? C(0) : C(1) / C(Q);
    const auto without_along = [=](int64_t h, auto q) {
      return q.load(g + h * ld) - q.load(n + h * ld) * (along[h] * share);
    };
    if (fixed_istd) {
      block.unfenced().row_items(H, [=](int64_t h) { along[h] = across[h] = 0; });
    } else {
      // Each row's sums are known to the warp that takes it: no barriers.
      block.unfenced().row_sums(H, Q, along,
                                [&](int64_t h, auto q) { return q.load(g + h * ld) * q.load(n + h * ld); });
      block.unfenced().row_sums(H, Q, across, without_along);
    }
    const C* scale = fixed_istd ? fixed_istd : istd;
    block.unfenced().row_sums(H, Q, kept, [&](int64_t h, auto q) {
      const auto value = (without_along(h, q) - across[h] * share) * scale[h];
      const auto passed = B::where_positive(q.load(a + h * ld), value);
      q.store(g + h * ld, passed);
      return passed;
    });
    block.row_items(H, [=](int64_t h) { gb[h] += kept[h]; });
  }
};

}  // namespace kernelmeta
