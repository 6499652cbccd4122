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
  C* w3;     // [N, H]
  C* b3;     // [N]
  C* mean1;  // [H]
  C* istd1;  // [H]
  C* mean2;  // [H]
  C* istd2;  // [H]

  template <class S>
  __host__ __device__ __forceinline__ FoldedMlp(Arena<C>& arena, const S& s, bool fixed_stats)
      : w1(arena.take(s.H * s.N)),
        b1(arena.take(s.H)),
        w2(arena.take(s.H * s.H)),
        b2(arena.take(s.H)),
        w3(arena.take(s.N * s.H)),
        b3(arena.take(s.N)),
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
  C* w3;   // [N, padded(H)]
  C* b3;   // [N]

  template <class S>
  __host__ __device__ __forceinline__ FoldedMlpGrad(Arena<C>& arena, const S& s)
      : w1t(arena.take(s.N * padded(s.H))),
        b1(arena.take(s.H)),
        w2(arena.take(s.H * padded(s.H))),
        b2(arena.take(s.H)),
        w3(arena.take(s.N * padded(s.H))),
        b3(arena.take(s.N)) {}
};

template <class B>
struct Mlp {
  using C = typename B::Scalar;

  // What the backward pass needs of the forward pass. The arrays that `outer` reads are padded in units too.
  // Where no backward pass comes, layers are normalised in place.
  struct Activations {
    C *n1, *n2;        // [padded(H)][ld]: after ReLU and normalisation
    C *a1, *a2;        // [H][ld]: after the linear layer
    C *istd1, *istd2;  // [H]

    __host__ __device__ __forceinline__ Activations(Arena<C>& arena, const typename B::Sizes& s,
                                                    bool backward)
        : n1(arena.take(padded(s.H) * s.ld())),
          n2(arena.take(padded(s.H) * s.ld())),
          a1(backward ? arena.take(s.H * s.ld()) : n1),
          a2(backward ? arena.take(s.H * s.ld()) : n2),
          istd1(arena.take(s.H)),
          istd2(arena.take(s.H)) {}
  };

  B& block;
  const typename B::Sizes& s;
  const FoldedMlp<C>& w;
  Activations act;

  // `backward`: whether backward() will be called.
  __host__ __device__ __forceinline__ Mlp(B& block, const typename B::Sizes& s, const FoldedMlp<C>& w,
                                          bool backward, Arena<C>& arena)
      : block(block), s(s), w(w), act(arena, s, backward) {}

  // z [N][ld] -> g [N][ld]. Where `stats` [2][2][H] is given it receives mean and unbiased variance per
  // layer.
  __host__ __device__ __forceinline__ void forward(const C* z, C* g, C* stats) {
    const int64_t H = s.H, ld = s.ld();
    block.mm(H, s.N, s.Q, {w.w1, s.N, 1}, z, ld, act.a1, ld, w.b1);
    normalise(act.a1, act.n1, act.istd1, w.mean1, w.istd1, stats);
    block.mm(H, H, s.Q, {w.w2, H, 1}, act.n1, ld, act.a2, ld, w.b2);
    normalise(act.a2, act.n2, act.istd2, w.mean2, w.istd2, stats ? stats + 2 * H : nullptr);
    block.mm(s.N, H, s.Q, {w.w3, H, 1}, act.n2, ld, g, ld, w.b3);
  }

  // gg [N][ld] -> gz [N][ld], from the activations of the last forward(z); adds to `grad`.
  // g2: scratch, [H][ld].
  __host__ __device__ __forceinline__ void backward(const C* z, const C* gg, C* gz, C* g2,
                                                    const FoldedMlpGrad<C>& grad) {
    const int64_t N = s.N, H = s.H, ld = s.ld(), ldh = padded(H);
    C* g1 = act.n2;  // which is read for the last time before g1 is written
    block.mm(H, N, s.Q, {w.w3, 1, H}, gg, ld, g2, ld, nullptr);
    block.rows(N, s.Q, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto q) { return q.load(gg + n * ld); });
      row.one([&] { grad.b3[n] += sum; });
    });
    block.outer(N, H, s.Q, gg, ld, act.n2, ld, grad.w3, ldh);
    through_norm(act.a2, act.n2, act.istd2, g2, grad.b2, w.mean2 != nullptr);
    block.mm(H, H, s.Q, {w.w2, 1, H}, g2, ld, g1, ld, nullptr);
    block.outer(H, H, s.Q, g2, ld, act.n1, ld, grad.w2, ldh);
    through_norm(act.a1, act.n1, act.istd1, g1, grad.b1, w.mean1 != nullptr);
    block.mm(N, H, s.Q, {w.w1, 1, N}, g1, ld, gz, ld, nullptr);
    block.outer(N, H, s.Q, z, ld, g1, ld, grad.w1t, ldh);
  }

 private:
  // n = (relu(a) - mean) / std per unit, over the rows of this task or with the statistics given.
  __host__ __device__ __forceinline__ void normalise(const C* a, C* n, C* istd, const C* fixed_mean,
                                                     const C* fixed_istd, C* stats) {
    const int64_t Q = s.Q, ld = s.ld();
    block.rows(s.H, Q, [&](int64_t h, auto row) {
      const C* ah = a + h * ld;
      C mean, scale;
      if (fixed_mean) {
        mean = fixed_mean[h];
        scale = fixed_istd[h];
      } else {
        mean = row.sum([&](auto q) { return B::relu(q.load(ah)); }) / C(Q);
        const C squares = row.sum([&](auto q) {
          const auto d = B::relu(q.load(ah)) - mean;
          return d * d;
        });
        scale = B::inverse_std(squares, Q, kNormEps);
        if (stats) {
          row.one([&] {
            stats[h] = mean;
            stats[s.H + h] = squares / C(Q > 1 ? Q - 1 : 1);
          });
        }
      }
      row.one([&] { istd[h] = scale; });
      row.each([&](auto q) { q.store(n + h * ld, (B::relu(q.load(ah)) - mean) * scale); });
    });
  }

  // In place on g: through the normalisation and the ReLU; adds the sum over rows to the bias' gradient.
  __host__ __device__ __forceinline__ void through_norm(const C* a, const C* n, const C* istd, C* g, C* gb,
                                                        bool fixed) {
    const int64_t Q = s.Q, ld = s.ld();
    block.rows(s.H, Q, [&](int64_t h, auto row) {
      const C *ah = a + h * ld, *nh = n + h * ld;
      C* gh = g + h * ld;
      C along_one = 0, along_n = 0;
      if (!fixed) {
        along_one = row.sum([&](auto q) { return q.load(gh); }) / C(Q);
        along_n = row.sum([&](auto q) { return q.load(gh) * q.load(nh); }) / C(Q);
      }
      const C scale = istd[h];
      const C sum = row.sum([&](auto q) {
        const auto value = (q.load(gh) - along_one - q.load(nh) * along_n) * scale;
        const auto kept = B::where_positive(q.load(ah), value);
        q.store(gh, kept);
        return kept;
      });
      row.one([&] { gb[h] += sum; });
    });
  }
};

}  // namespace kernelmeta
