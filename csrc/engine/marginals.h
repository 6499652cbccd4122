// Oracles that look at means of predictions. Some know which shares p of the rows the classes have.  With pi
// = softmax(z), means over the rows:
//
//   proportions   G = J(pi, u), u = -p / mean(pi): the gradient of -sum_n p_n log mean(pi_n)
//   marginal entropy  the same with u = -log mean(pi), or -alpha / (alpha - 1) (mean(pi)^(alpha - 1) - 1):
//                 the gradient of -sum_n m_n log m_n, or of (1 - sum_n m_n^alpha) / (alpha - 1), m = mean(pi)
//                 (Tsallis; Veilleux et al. 2021, eq. 5). With alpha other than 1 the entropy of each row,
//                 too, is here: u then is of its own pi.
//   assignment    T = softmax(z + g), mean(T) = p exp(-tau g), tau = (1 - relax) / relax, and G = pi - T
//   soft k-means  T itself, with which the classifier moves
//
// where J(a, b) = a (b - <a, b>). g is the minimum of the convex function mean(lse(z + g)) + phi(g), phi =
// -<p, g> where tau is zero, else <p, exp(-tau g)> / tau (the dual of a KL divergence that stands for the
// constraint: unbalanced transport). Newton's method finds it. Its steps are at most four long, twice that
// after each such step that descends, and halved until they descend: sharp logits make its matrix singular
// but for rounding. Classes with p = 0 are left out.
//
// The rows may be divided into bags, one after the other, each with its own p.
#pragma once

#include "engine/oracles.h"

namespace kernelmeta {

// Whose p it is.
enum class Shares : int64_t { kNone = 0, kUniform = 1, kGiven = 2 };

template <class B>
struct Marginals {
  using C = typename B::Scalar;

  static constexpr bool kWide = sizeof(C) == 8;
  static constexpr C kTarget = C(kWide ? 1e-12 : 1e-6);     // of mean(T) - p
  static constexpr C kTolerance = C(kWide ? 1e-10 : 1e-5);  // else the bag, and so the task, is NaN
  static constexpr C kRidge = C(kWide ? 1e-14 : 1e-6);      // of Newton's matrix
  static constexpr C kSame = C(kWide ? 1e-14 : 1e-6);       // rounding of the function
  static constexpr C kLongest = 4, kLeastMass = C(1e-30);
  static constexpr int kSteps = 100, kHalvings = 30;

  B& block;
  const int64_t N, ld;  // of the tiles: all rows of a task fit
  C *z, *t, *gg, *gz;   // [N][ld]: of one bag: log pi; pi or T; gradients
  C* lse;               // [ld]
  C *p, *mean, *r;      // [N]: shares of the bag; mean(T); mean(T) - p exp(-tau g), or u
  C *g, *step, *next;   // [N]
  C* h;                 // [N][N]
  // [kValues]: of the function, at g and at the next one; then how long a step is, how long it may be, and
  // what of it is tried first.
  C* value;
  enum : int { kStep = 2, kLimit, kTried, kValues };

  // N is 0 where nobody asks.
  KERNELMETA_INLINE Marginals(Arena<C>& arena, B& block, int64_t N, int64_t rows)
      : block(block),
        N(N),
        ld(N ? padded(rows) : 0),
        z(arena.take(N * ld)),
        t(arena.take(N * ld)),
        gg(arena.take(N * ld)),
        gz(arena.take(N * ld)),
        lse(arena.take(ld)),
        p(arena.take(N)),
        mean(arena.take(N)),
        r(arena.take(N)),
        g(arena.take(N)),
        step(arena.take(N)),
        next(arena.take(N)),
        h(arena.take(N * N)),
        value(arena.take(N ? kValues : 0)) {}

  // Rows first .. first + rows of arrays [N][ldz], and their shares [N] (null: equal).
  struct Bag {
    int64_t ldz, first, rows;
    const C* shares;
    C* grad_shares;  // [N] or null, added to

    KERNELMETA_INLINE int64_t at(int64_t n, int64_t q) const { return n * ldz + first + q; }
  };

  // G of `to`, from the logits `from`, [N][ldz] each; share: what the sum over the rows is multiplied by.
  // tau: of entropies alpha.
  __host__ __device__ KERNELMETA_NOINLINE void forward(Oracle oracle, const Bag& bag, C tau, C share,
                                                       const C* from, C* to) {
    begin(oracle, bag, tau, from);
    if (B::kJointSteps && oracle == Oracle::kEntropy) {
      block.columns(bag.rows, [&](auto at) {
        auto along = at.zero();
        for (int64_t n = 0; n < N; ++n) along = along + drift(at, n, tau);
        for (int64_t n = 0; n < N; ++n) {
          const auto own = drift(at, n, tau);
          at.store(t + n * ld, (own - at.load(t + n * ld) * along) * share);
        }
      });
    } else if (of_mean(oracle)) {
      block.columns(bag.rows, [&](auto at) {
        auto along = at.zero();
        for (int64_t n = 0; n < N; ++n) along = along + at.load(t + n * ld) * r[n];
        for (int64_t n = 0; n < N; ++n) {
          at.store(t + n * ld, at.load(t + n * ld) * (along * C(-1) + r[n]) * share);
        }
      });
    } else {
      solve(bag.rows, tau);
      if (oracle == Oracle::kAssignment) {
        block.columns(bag.rows, [&](auto at) {
          for (int64_t n = 0; n < N; ++n) {
            at.store(t + n * ld, (B::exp(at.load(z + n * ld)) - at.load(t + n * ld)) * share);
          }
        });
      }
    }
    block.unfenced().each_item(N * bag.rows, [&](int64_t i) {
      const int64_t n = i / bag.rows, q = i % bag.rows;
      to[bag.at(n, q)] = t[n * ld + q];
    });
  }

  // The gradient `of_g` of G -> that of the logits; G as `forward` left it.
  __host__ __device__ KERNELMETA_NOINLINE void backward(Oracle oracle, const Bag& bag, C tau, C share,
                                                        const C* from, const C* found, const C* of_g, C* to) {
    begin(oracle, bag, tau, from);
    block.each_item(N * bag.rows, [&](int64_t i) {
      const int64_t n = i / bag.rows, q = i % bag.rows;
      gg[n * ld + q] = of_g[bag.at(n, q)];
    });
    if (B::kJointSteps && oracle == Oracle::kEntropy) {
      through_entropy(bag, tau, share);
    } else if (of_mean(oracle)) {
      through_means(oracle, bag, tau, share);
    } else {
      const bool both = oracle == Oracle::kAssignment;
      block.each_item(N * bag.rows, [&](int64_t i) {
        const int64_t n = i / bag.rows, q = i % bag.rows;
        const C own = found[bag.at(n, q)];
        t[n * ld + q] = both ? t[n * ld + q] - own / share : own;
      });
      through_transport(bag, tau, both ? -share : C(1), both ? share : C(0));
    }
    block.unfenced().each_item(N * bag.rows, [&](int64_t i) {
      const int64_t n = i / bag.rows, q = i % bag.rows;
      to[bag.at(n, q)] = gz[n * ld + q];
    });
  }

 private:
  // Whether it is a loss of the mean prediction.
  KERNELMETA_INLINE static bool of_mean(Oracle oracle) {
    return oracle == Oracle::kProportions || (B::kJointSteps && oracle == Oracle::kMarginalEntropy);
  }

  // z = log pi, t = pi, mean and p; of a loss of the mean, r = u.
  KERNELMETA_INLINE void begin(Oracle oracle, const Bag& bag, C alpha, const C* from) {
    block.each_item(N * bag.rows, [&](int64_t i) {
      const int64_t n = i / bag.rows, q = i % bag.rows;
      z[n * ld + q] = from[bag.at(n, q)];
    });
    block.columns(bag.rows, [&](auto at) {
      const auto sum = softmax<B>(at, N, ld, z, t);
      for (int64_t n = 0; n < N; ++n) at.store(z + n * ld, at.load(z + n * ld) - sum);
    });
    block.rows(N, bag.rows, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto q) { return q.load(t + n * ld); });
      row.one([&] {
        mean[n] = sum / C(bag.rows);
        p[n] = bag.shares ? bag.shares[n] : C(1) / C(N);
        const C m = B::max(mean[n], kLeastMass);
        if (oracle == Oracle::kProportions) r[n] = -p[n] / m;
        if (B::kJointSteps && oracle == Oracle::kMarginalEntropy) {
          r[n] = alpha == C(1) ? -B::log(m) : B::expm1((alpha - C(1)) * B::log(m)) * alpha / (C(1) - alpha);
        }
      });
    });
  }

  // Of an entropy whose alpha is not 1: alpha / (1 - alpha) (p^alpha - p) of a row's prediction p of class n,
  // which is p times the entropy's derivative but for a constant. (Without it nothing is lost where alpha is
  // nearly 1.)
  template <class At>
  KERNELMETA_INLINE auto drift(At at, int64_t n, C alpha) const {
    const auto log_p = at.load(z + n * ld), p = at.load(t + n * ld), x = log_p * (alpha - C(1));
    const auto far = B::exp(log_p * alpha) - p;
    return (B::max(x, x * C(-1)) <= C(B::kSmall) ? p * B::expm1_small(x) : far) * (alpha / (C(1) - alpha));
  }

  // As through_means, with u of every row. With w the drift of p and W the sum of a row's, G = w - p W and dw
  // = alpha (w - p) dp / p.
  KERNELMETA_INLINE void through_entropy(const Bag& bag, C alpha, C share) {
    block.columns(bag.rows, [&](auto at) {
      auto along = at.zero(), mean_g = at.zero(), other = at.zero();
      for (int64_t n = 0; n < N; ++n) mean_g = mean_g + at.load(t + n * ld) * at.load(gg + n * ld);
      for (int64_t n = 0; n < N; ++n) {
        const auto w = drift(at, n, alpha);
        along = along + w;
        other = other + (at.load(gg + n * ld) - mean_g) * (w - at.load(t + n * ld)) * alpha;
      }
      for (int64_t n = 0; n < N; ++n) {
        const auto own = at.load(t + n * ld), w = drift(at, n, alpha);
        const auto moved = (at.load(gg + n * ld) - mean_g) * ((w - own) * alpha - own * along);
        at.store(gz + n * ld, (moved - own * other) * share);
      }
    });
  }

  KERNELMETA_INLINE void through_means(Oracle oracle, const Bag& bag, C alpha, C share) {
    block.columns(bag.rows, [&](auto at) { softmax_backward<B>(at, N, ld, t, gg, C(1), gz); });
    block.rows(N, bag.rows, [&](int64_t n, auto row) {
      const C sum = row.sum([&](auto q) { return q.load(gz + n * ld); });
      row.one([&] {
        const C relative = sum / C(bag.rows) / B::max(mean[n], kLeastMass);
        // the derivative of u along gz
        const bool entropy = B::kJointSteps && oracle == Oracle::kMarginalEntropy;
        step[n] = (!entropy ? -r[n] : r[n] * (alpha - C(1)) - alpha) * relative;
        if (bag.grad_shares) bag.grad_shares[n] -= relative * share * C(bag.rows);
      });
    });
    // gz = dpi (u - <pi, u>) + pi (du - <dpi, u> - <pi, du>)
    block.columns(bag.rows, [&](auto at) {
      auto along = at.zero(), other = at.zero();
      for (int64_t n = 0; n < N; ++n) {
        const auto own = at.load(t + n * ld);
        along = along + own * r[n];
        other = other + at.load(gz + n * ld) * r[n] + own * step[n];
      }
      for (int64_t n = 0; n < N; ++n) {
        const auto moved = at.load(gz + n * ld) * (along * C(-1) + r[n]);
        at.store(gz + n * ld, (moved + at.load(t + n * ld) * (other * C(-1) + step[n])) * share);
      }
    });
  }

  // gz = J(T, of_t gg + lambda / rows) + of_pi J(pi, gg); H lambda = -of_t sum_q J(T, gg).
  KERNELMETA_INLINE void through_transport(const Bag& bag, C tau, C of_t, C of_pi) {
    block.columns(bag.rows, [&](auto at) { softmax_backward<B>(at, N, ld, t, gg, of_t, gz); });
    block.unfenced().rows(N, bag.rows, [&](int64_t n, auto row) {
      const C along = row.sum([&](auto q) { return q.load(gz + n * ld); });
      const C sum = row.sum([&](auto q) { return q.load(t + n * ld); });
      row.one([&] {
        step[n] = -along;
        mean[n] = sum / C(bag.rows);
        r[n] = 0;
      });
    });
    newton_matrix(bag.rows, tau);
    solve_newton();
    const C per_row = C(1) / C(bag.rows);
    block.columns(bag.rows, [&](auto at) {
      auto along = at.zero(), of_prediction = at.zero();
      for (int64_t n = 0; n < N; ++n) {
        along = along + at.load(t + n * ld) * (step[n] * per_row);
        of_prediction = of_prediction + B::exp(at.load(z + n * ld)) * at.load(gg + n * ld);
      }
      for (int64_t n = 0; n < N; ++n) {
        const auto moved = at.load(t + n * ld) * (along * C(-1) + step[n] * per_row);
        const auto own = B::exp(at.load(z + n * ld)) * (at.load(gg + n * ld) - of_prediction) * of_pi;
        at.store(gz + n * ld, at.load(gz + n * ld) + moved + own);
      }
    });
    if (!bag.grad_shares) return;
    block.unfenced().each_item(N, [&](int64_t n) {
      if (p[n] > C(0)) bag.grad_shares[n] -= step[n] * mean[n] / p[n];
    });
  }

  // ---- Newton's method

  // z, mean(pi) and p -> T in t.
  KERNELMETA_INLINE void solve(int64_t rows, C tau) {
    // One step of Sinkhorn's algorithm, which descends.
    const C relax = C(1) / (C(1) + tau);
    block.each_item(N, [&](int64_t n) {
      if (n == 0) value[kLimit] = kLongest;
      g[n] = p[n] > C(0) ? relax * (B::log(p[n]) - B::log(B::max(mean[n], kLeastMass))) : C(0);
    });
    evaluate(rows, tau, g, value);
    for (int k = 0; k < kSteps; ++k) {
      if (!block.any(N, [&](int64_t n) { return !within(r[n], kTarget); })) break;
      if (block.any(1, [&](int64_t) { return !(value[0] - value[0] == C(0)); })) break;
      block.unfenced().each_item(N, [&](int64_t n) { step[n] = -r[n]; });
      newton_matrix(rows, tau);
      solve_newton();
      block.each_item(1, [&](int64_t) {
        C longest = 0;
        for (int64_t n = 0; n < N; ++n) longest = B::max(longest, B::max(step[n], -step[n]));
        value[kStep] = longest;
        value[kTried] = longest > value[kLimit] ? value[kLimit] / longest : C(1);
      });
      C length = value[kTried];
      bool descends = false;
      int tried = 0;
      for (; tried < kHalvings && !descends; ++tried, length *= C(0.5)) {
        block.each_item(N, [&](int64_t n) { next[n] = g[n] + length * step[n]; });
        evaluate(rows, tau, next, value + 1);
        descends = block.any(
            1, [&](int64_t) { return value[1] <= value[0] + kSame * (C(1) + B::max(value[0], -value[0])); });
      }
      block.unfenced().each_item(N, [&](int64_t n) { g[n] = next[n]; });
      block.unfenced().each_item(1, [&](int64_t) {
        value[0] = value[1];
        value[kLimit] = tried == 1 && value[kStep] > value[kLimit] ? 2 * value[kLimit] : kLongest;
      });
      if (!descends) break;
    }
    const bool failed = block.any(N, [&](int64_t n) { return !within(r[n], kTolerance); });
    if (!failed) return;
    block.rows(N, rows, [&](int64_t n, auto row) {
      row.each([&](auto q) { q.store(t + n * ld, q.zero() + C(__builtin_nan(""))); });
    });
  }

  KERNELMETA_INLINE static bool within(C x, C bound) { return x <= bound && -x <= bound; }

  // (exp(x) - 1) / x. Both logarithm and difference are of the rounded exponential: what it lost goes out.
  KERNELMETA_INLINE static C growth(C x) {
    const C e = B::max(B::exp(x), kLeastMass);
    return e == C(1) ? C(1) : (e - C(1)) / B::log(e);
  }

  // T, mean(T), r and the function at `where`.
  KERNELMETA_INLINE void evaluate(int64_t rows, C tau, const C* where, C* found) {
    block.columns(rows, [&](auto at) {
      auto top = at.zero() - C(__builtin_inff());
      for (int64_t n = 0; n < N; ++n) {
        if (p[n] > C(0)) top = B::max(top, at.load(z + n * ld) + where[n]);
      }
      auto sum = at.zero();
      for (int64_t n = 0; n < N; ++n) {
        auto e = at.zero();
        if (p[n] > C(0)) e = B::exp(at.load(z + n * ld) + where[n] - top);
        at.store(t + n * ld, e);
        sum = sum + e;
      }
      const auto inverse = C(1) / sum;
      for (int64_t n = 0; n < N; ++n) at.store(t + n * ld, at.load(t + n * ld) * inverse);
      at.store(lse, top + B::log(sum));
    });
    block.rows(N + 1, rows, [&](int64_t n, auto row) {
      const C* of = n < N ? t + n * ld : lse;
      const C average = row.sum([&](auto q) { return q.load(of); }) / C(rows);
      row.one([&] {
        if (n < N) {
          mean[n] = average;
          r[n] = average - (tau > C(0) ? p[n] * B::exp(-tau * where[n]) : p[n]);
        } else {
          *found = average;
        }
      });
    });
    block.unfenced().each_item(1, [&](int64_t) {
      for (int64_t n = 0; n < N; ++n) {
        *found -= p[n] * where[n] * growth(-tau * where[n]);
      }
    });
  }

  // h = mean(diag(T) - T T^T) + tau diag(p exp(-tau g)); where tau is zero plus one everywhere, since g is
  // known but for a number that is added to all. Of the classes that are not left out.
  KERNELMETA_INLINE void newton_matrix(int64_t rows, C tau) {
    const FeatureRows<C> of{t, ld, nullptr};
    block.dots(N, of, N, of, rows, h, N);
    block.each_item(N * N, [&](int64_t i) {
      const int64_t a = i / N, b = i % N;
      const bool in = p[a] > C(0) && p[b] > C(0);
      C value = in ? (tau > C(0) ? C(0) : C(1)) - h[i] / C(rows) : C(0);
      if (a == b) value = in ? value + mean[a] + tau * (mean[a] - r[a]) + kRidge : C(1);
      h[i] = value;
    });
  }

  // step <- the solution of h x = step; L D L^T in the place of h, below the diagonal.
  KERNELMETA_INLINE void solve_newton() {
    for (int64_t j = 0; j < N; ++j) {
      block.each_item(N - j - 1, [&](int64_t below) {
        const int64_t i = j + 1 + below;
        const C factor = h[i * N + j] / h[j * N + j];
        for (int64_t k = j + 1; k <= i; ++k) h[i * N + k] -= factor * h[k * N + j];
        step[i] -= factor * step[j];
      });
    }
    for (int64_t j = N - 1; j > 0; --j) {
      block.each_item(j, [&](int64_t i) { step[i] -= h[j * N + i] * (step[j] / h[j * N + j]); });
    }
    block.each_item(N, [&](int64_t n) { step[n] /= h[n * N + n]; });
  }
};

}  // namespace kernelmeta
