// What the MLP of the equivariant gradient is told of a pair of a row and a class, and the way back.
//
// With p = softmax(z) of a row, L = log sum exp(z), and means over the task's rows q, of which there are Q:
//
//   0  log p, at least -20                 4  the row's entropy -sum_n p log p
//   1  p                                   5  z - mean_q z
//   2  log(m + eps), m = N mean_q p        6  p / (m + eps)
//   3  log p - log(1 - p), within +-20
//
// Each is normalised over all pairs of the task. None depends on how the classes are numbered, so that the
// MLP, which all pairs share, serves any number of classes, and renumbering them renumbers its guesses
// (kernelmeta/reference/equivariant_gradient.py).
#pragma once

#include "engine/mlp.h"
#include "engine/oracles.h"

namespace kernelmeta {

inline constexpr int64_t kPairInputs = 7;

// The MLP's sizes for so many rows of N classes.
KERNELMETA_INLINE Sizes pair_sizes(int64_t rows, int64_t N, int64_t D, int64_t H, int64_t K) {
  return {1, 0, rows * N, kPairInputs, D, H, K, true};
}

template <class B>
struct PairInputs {
  using C = typename B::Scalar;

  static constexpr double kClamp = 20, kEps = 1e-9, kTiny = 1e-30;

  B& block;
  int64_t N, rows;       // z is [N][padded(rows)]
  C *x, *gx;             // [kPairInputs][ldp]: the inputs, normalised, pair n * rows + q; their gradient
  C* out;                // [ldp]: what the MLP says of them, or its gradient
  C *p, *of_rest;        // [N][ld]; derivative of log(1 - p), zero where that difference of logs is clamped
  C *log_sum, *entropy;  // [ld]
  C *istd, *mass;        // [kPairInputs]; m + eps, [N]

  KERNELMETA_INLINE PairInputs(Arena<C>& arena, B& block, int64_t N, int64_t rows)
      : block(block),
        N(N),
        rows(rows),
        x(arena.take(kPairInputs * ldp())),
        gx(arena.take(kPairInputs * ldp())),
        out(arena.take(ldp())),
        p(arena.take(N * ld())),
        of_rest(arena.take(N * ld())),
        log_sum(arena.take(ld())),
        entropy(arena.take(ld())),
        istd(arena.take(kPairInputs)),
        mass(arena.take(N)) {}

  // z -> x; p and what else the way back needs.
  __host__ __device__ KERNELMETA_NOINLINE void forward(const C* z) {
    const int64_t N = this->N, rows = this->rows, ld = this->ld(), ldp = this->ldp();
    block.feature_columns(rows, [&](auto at) {
      const auto sum = softmax<B>(at, N, ld, z, p);
      auto before = at.zero(), after = at.zero(), information = at.zero();
      for (int64_t n = 0; n < N; ++n) {
        const auto own = at.load(p + n * ld);
        information = information - own * (at.load(z + n * ld) - sum);
        at.store(of_rest + n * ld, before);
        before = before + own;
      }
      at.store(log_sum, sum);
      at.store(entropy, information);
      // 1 - p as the sum over the other classes, which loses no digits.
      for (int64_t n = N - 1; n >= 0; --n) {
        const auto own = at.load(p + n * ld), log_p = at.load(z + n * ld) - sum;
        const auto rest = B::max(at.load(of_rest + n * ld) + after, at.zero() + C(kTiny));
        after = after + own;
        const auto odds = log_p - B::log(rest);
        const auto inside = B::where_positive(odds + C(kClamp), at.zero() + C(1)) *
                            B::where_positive(C(kClamp) - odds, at.zero() + C(1));
        at.store(of_rest + n * ld, inside / rest);
        C* to = x + n * rows;
        at.store(to, at_least(at, log_p));
        at.store(to + ldp, own);
        at.store(to + 3 * ldp, at_least(at, at_least(at, odds * C(-1)) * C(-1)));
        at.store(to + 4 * ldp, information);
      }
    });
    block.features(N, rows, [&](int64_t n, auto row) {
      const C *own = p + n * ld, *of_class = z + n * ld;
      C* to = x + n * rows;
      const C m = row.sum([&](auto q) { return q.load(own); }) * (C(N) / C(rows)) + C(kEps);
      const C centre = row.sum([&](auto q) { return q.load(of_class); }) / C(rows);
      const C log_m = B::log(m), inverse = C(1) / m;
      row.each([&](auto q) {
        q.store(to + 2 * ldp, q.zero() + log_m);
        q.store(to + 5 * ldp, q.load(of_class) - centre);
        q.store(to + 6 * ldp, q.load(own) * inverse);
      });
      row.one([&] { mass[n] = m; });
    });
    normalise();
  }

  // gx -> gz [N][ld], after forward(z); gx is overwritten.
  __host__ __device__ KERNELMETA_NOINLINE void backward(const C* z, C* gz) {
    const int64_t N = this->N, rows = this->rows, ld = this->ld(), ldp = this->ldp();
    through_norm();
    // Of p itself, and of z itself: what the class' mean has is in the place of its own.
    block.features(N, rows, [&](int64_t n, auto row) {
      C* g = gx + n * rows;
      const C inverse = C(1) / mass[n], share = C(1) / C(rows);
      const C of_mass = row.sum([&](auto q) {
        return (q.load(g + 2 * ldp) - q.load(g + 6 * ldp) * (q.load(p + n * ld) * inverse)) * inverse;
      });
      const C of_centre = row.sum([&](auto q) { return q.load(g + 5 * ldp); }) * share;
      row.each([&](auto q) {
        q.store(g + ldp, q.load(g + ldp) + q.load(g + 6 * ldp) * inverse + of_mass * (C(N) * share));
        q.store(g + 5 * ldp, q.load(g + 5 * ldp) - of_centre);
      });
    });
    block.feature_columns(rows, [&](auto at) {
      const auto sum = at.load(log_sum), information = at.load(entropy);
      auto along = at.zero(), of_log = at.zero(), of_entropy = at.zero(), before = at.zero(),
           after = at.zero();
      for (int64_t n = 0; n < N; ++n) {
        C* g = gx + n * rows;
        along = along + at.load(p + n * ld) * at.load(g + ldp);
        of_log = of_log + unclamped(at, g, at.load(z + n * ld) - sum);
        of_entropy = of_entropy + at.load(g + 4 * ldp);
        at.store(g + 2 * ldp, before);
        before = before + at.load(g + 3 * ldp) * at.load(of_rest + n * ld);
      }
      for (int64_t n = N - 1; n >= 0; --n) {
        const C* g = gx + n * rows;
        const auto log_p = at.load(z + n * ld) - sum, inverse = at.load(of_rest + n * ld);
        const auto of_odds = at.load(g + 3 * ldp);
        const auto of_others = at.load(g + 2 * ldp) + after;  // of the others' 1 - p, of which p is a part
        after = after + of_odds * inverse;
        const auto of_p = at.load(g + ldp) - along - of_log - of_entropy * (log_p + information) - of_others;
        at.store(gz + n * ld, at.load(p + n * ld) * of_p + unclamped(at, g, log_p) + at.load(g + 5 * ldp) +
                                  B::where_positive(inverse, of_odds));
      }
    });
  }

  // What the MLP says -> g [N][ld], and back.
  KERNELMETA_INLINE void take_out(C* g) const {
    const int64_t rows = this->rows, ld = this->ld();
    block.features(N, rows, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(g + n * ld, q.load(out + n * rows)); });
    });
  }
  KERNELMETA_INLINE void put_in(const C* gg) const {
    const int64_t rows = this->rows, ld = this->ld(), pairs = N * rows;
    block.unfenced().features(N, rows, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(out + n * rows, q.load(gg + n * ld)); });
    });
    block.each_item(ldp() - pairs, [&](int64_t i) { out[pairs + i] = C(0); });
  }

 private:
  KERNELMETA_INLINE int64_t ld() const { return padded(rows); }
  KERNELMETA_INLINE int64_t ldp() const { return padded(N * rows); }

  template <class At, class V>
  KERNELMETA_INLINE static V at_least(At at, V value) {
    return B::max(value, at.zero() - C(kClamp));  // keeps NaN
  }
  // The gradient of log p, where that is not clamped.
  template <class At, class V>
  KERNELMETA_INLINE static V unclamped(At at, const C* g, V log_p) {
    return B::where_positive(log_p + C(kClamp), at.load(g));
  }

  KERNELMETA_INLINE void normalise() {
    const int64_t pairs = N * rows, ldp = this->ldp();
    block.rows(kPairInputs, pairs, [&](int64_t f, auto row) {
      C* own = x + f * ldp;
      const C mean = row.sum([&](auto i) { return i.load(own); }) / C(pairs);
      const C squares = row.sum([&](auto i) {
        const auto d = i.load(own) - mean;
        return d * d;
      });
      const C scale = B::inverse_std(squares, pairs, kNormEps);
      row.each([&](auto i) { i.store(own, (i.load(own) - mean) * scale); });
      row.one([&] { istd[f] = scale; });
    });
  }

  // gx, of the normalised inputs -> of the inputs. What is subtracted is the mean of what there is, as in
  // mlp.h.
  KERNELMETA_INLINE void through_norm() {
    const int64_t ldp = this->ldp();
    const C share = C(1) / C(N * rows);
    block.rows(kPairInputs, N * rows, [&](int64_t f, auto row) {
      const C* own = x + f * ldp;
      C* g = gx + f * ldp;
      const C along = row.sum([&](auto i) { return i.load(g) * i.load(own); }) * share;
      const auto left = [&](auto i) { return i.load(g) - i.load(own) * along; };
      const C across = row.sum(left) * share, scale = istd[f];
      row.each([&](auto i) { i.store(g, (left(i) - across) * scale); });
    });
  }
};

}  // namespace kernelmeta
