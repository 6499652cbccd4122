// Focal distillation: of each row of logits the loss of its label, its distance from the old logits, weighted
// by whether those are right, and the gradient. kernelmeta/reference/focal_distillation.py is the
// specification.
#pragma once

#include "engine/problem.h"

namespace kernelmeta {

enum class LogitDistance : int64_t { kKl, kSquared, kSquaredMean, kLdi, kLdiMean };

// What is said of a row, as a sum; see kernelmeta/flip_counts.py.
enum : uint8_t { kOldRight = 1, kNewRight = 2, kCounted = 4 };

// What the forward pass leaves of a row: numbers of the computation's precision, in this order. What its
// distance does not need is 0.
struct DistillationRow {
  enum : int64_t {
    kFocus,       // alpha + beta [old right]
    kMax,         // of the new logits
    kInverse,     // 1 / the sum of e^(new - kMax)
    kOthers,      // the part of that sum that is not the label's
    kOldMax,      // of the old logits
    kOldInverse,  // 1 / the sum of e^((old - kOldMax) / tau)
    kPivot,       // new - old of a class whose old logit is kOldMax
    kCentre,      // E_p[v]
    kDivergence,  // log E_p[e^u]
    kNewInverse,  // 1 / the sum of e^((new - kMax) / tau); 0 where all u, and E_p[v], are near 0
    kOldSpread,   // (kOldMax - the smallest of the old logits) / tau
    kReach,       // where all u are near 0, no |u| is larger
    kSize
  };
};

template <class C>
struct DistillationProblem {
  int64_t R, N;           // rows, classes
  Features now, old;      // one row a task
  const int64_t* labels;  // [R]
  const C* class_weight;  // [N] or null
  LogitDistance distance;
  C alpha, beta, tau, margin, power, label_smoothing;
  bool label_loss;
  int64_t ignore_index;

  KERNELMETA_INLINE bool divergence() const { return distance == LogitDistance::kKl; }
  KERNELMETA_INLINE bool squared() const {
    return distance == LogitDistance::kSquared || distance == LogitDistance::kSquaredMean;
  }
  // What a sum over classes is multiplied by.
  KERNELMETA_INLINE C share() const {
    const bool mean = distance == LogitDistance::kSquaredMean || distance == LogitDistance::kLdiMean;
    return mean ? C(1) / C(N) : C(1);
  }
};

template <class C>
struct DistillationForward {
  DistillationProblem<C> problem;
  C* distances;     // [R]
  C* label_losses;  // [R] or null
  uint8_t* codes;   // [R]
  C* trace;         // [R][DistillationRow::kSize] or null
};

template <class C>
struct DistillationBackward {
  DistillationProblem<C> problem;
  const C* trace;
  const C* grad_distances;     // [R]
  const C* grad_label_losses;  // [R] or null
  C* grad_now;                 // [R][N]
};

// Rows of focal distillation; up to `rows` of them at once.
template <class B>
struct DistillationRows {
  using C = typename B::Scalar;
  using Row = DistillationRow;

  static constexpr bool kSingle = sizeof(C) == 4;
  // u beyond which classes are far, and log(p e^u) beyond which its sum is shifted.
  static constexpr double kFarthest = 20, kLargest = kSingle ? 60 : 600;
  // |u| up to which few terms of its series are enough.
  static constexpr double kTiny = 0.125;

  B& block;
  const DistillationProblem<C>& p;
  const C cold = C(1) / p.tau;
  C *wide_now, *wide_old;
  C* exponentials;  // [rows][padded(N)], of the forward pass

  KERNELMETA_INLINE DistillationRows(Arena<C>& arena, B& block, const DistillationProblem<C>& p, int64_t rows,
                                     bool backward)
      : block(block),
        p(p),
        wide_now(B::widening_buffer(arena, p.now, p.N)),
        wide_old(B::widening_buffer(arena, p.old, p.N)),
        exponentials(p.divergence() && !backward ? arena.take(rows * padded(p.N)) : nullptr) {}

  // Rows first .. first + count.
  KERNELMETA_INLINE void forward(const DistillationForward<C>& f, int64_t first, int64_t count) {
    block.unfenced().features(count, p.N, [&](int64_t i, auto row) {
      const int64_t r = first + i, y = p.labels[r];
      C found[Row::kSize] = {}, distance = 0, label_loss = 0;
      uint8_t code = 0;
      if (y != p.ignore_index) {
        if (y < 0 || y >= p.N) {
          distance = label_loss = C(__builtin_nan(""));
        } else {
          const auto* now = B::task_rows(p.now, r, p.N, wide_now)(0);
          const auto* old = B::task_rows(p.old, r, p.N, wide_old)(0);
          const Extent extent(row, now, old);
          found[Row::kMax] = extent.now;
          found[Row::kOldMax] = extent.old;
          const C own = row.entry(now, y);
          const bool old_right = right(row, old, y, row.entry(old, y), extent.old);
          code =
              kCounted + (old_right ? kOldRight : 0) + (right(row, now, y, own, extent.now) ? kNewRight : 0);
          found[Row::kFocus] = old_right ? p.alpha + p.beta : p.alpha;
          if (p.divergence()) {
            distance =
                p.tau * p.tau * divergence(row, now, old, y, extent, exponentials + i * padded(p.N), found);
          } else {
            if (p.label_loss) found[Row::kOthers] = row.sum(of_others(now, y, extent.now));
            distance = p.share() * (p.squared() ? row.sum([&](auto n) {
                         const auto d = apart(n, now, old);
                         return d * d * C(0.5);
                       })
                                                : row.sum([&](auto n) { return inhibition(n, now, old); }));
          }
          distance *= found[Row::kFocus];
          if (p.label_loss) label_loss = loss_of_label(row, now, y, own, found);
        }
      }
      row.one([&] {
        f.distances[r] = distance;
        f.codes[r] = code;
        if (f.label_losses) f.label_losses[r] = label_loss;
        if (!f.trace) return;
        for (int64_t k = 0; k < Row::kSize; ++k) f.trace[r * Row::kSize + k] = found[k];
      });
    });
  }

  KERNELMETA_INLINE void backward(const DistillationBackward<C>& f, int64_t first, int64_t count) {
    block.unfenced().features(count, p.N, [&](int64_t i, auto row) {
      const int64_t r = first + i, y = p.labels[r];
      C* to = f.grad_now + r * p.N;
      if (y == p.ignore_index || y < 0 || y >= p.N) {
        const C value = y == p.ignore_index ? C(0) : C(__builtin_nan(""));
        row.each([&](auto n) { n.store(to, n.zero() + value); });
        return;
      }
      const auto* now = B::task_rows(p.now, r, p.N, wide_now)(0);
      const auto* old = B::task_rows(p.old, r, p.N, wide_old)(0);
      const C* kept = f.trace + r * Row::kSize;
      const C along = f.grad_distances[r] * kept[Row::kFocus];
      const auto write = [&](auto of_distance) { add_label(f, row, r, y, now, to, kept, of_distance); };
      if (p.squared()) {
        write([&](auto n) { return apart(n, now, old) * (along * p.share()); });
      } else if (!p.divergence()) {
        write([&](auto n) { return inhibition_gradient(n, now, old) * (along * p.share()); });
      } else if (kept[Row::kNewInverse] != C(0)) {
        write([&](auto n) { return divergence_gradient(n, now, old, kept) * (along * p.tau); });
      } else {
        const C scale = along * p.tau * kept[Row::kOldInverse];
        const C mean = kept[Row::kCentre] + kept[Row::kDivergence];
        // p (e^(u - divergence) - 1) = q - p
        const auto near = [&](auto calm, auto few) {
          write([&](auto n) {
            const auto z = n.load(now), z_old = n.load(old);
            const auto e = cooled<calm()>(z_old - kept[Row::kOldMax]);
            const auto shifted = ((z - z_old) - kept[Row::kPivot]) * cold - mean;
            return where_present<calm()>(e, z, e * (shifted + near_excess<few()>(shifted)) * scale);
          });
        };
        const bool few = kept[Row::kReach] + kept[Row::kDivergence] <= C(kTiny);
        if (is_calm(kept[Row::kOldSpread])) {
          if (few)
            near(Yes(), Yes());
          else
            near(Yes(), No());
        } else {
          near(No(), No());
        }
      }
    });
  }

 private:
  struct Yes {
    KERNELMETA_INLINE constexpr bool operator()() const { return true; }
  };
  struct No {
    KERNELMETA_INLINE constexpr bool operator()() const { return false; }
  };

  // The largest logits of a row, the smallest old one, and the largest difference both ways; NaN aside.
  struct Extent {
    C now, old, old_least, above, below;

    template <class R_, class F>
    KERNELMETA_INLINE Extent(R_ row, const F* z, const F* z_old) {
      const auto most = row.mosts([&](auto n) { return n.load(z); }, [&](auto n) { return n.load(z_old); },
                                  [&](auto n) { return n.zero() - n.load(z_old); },
                                  [&](auto n) { return n.load(z) - n.load(z_old); },
                                  [&](auto n) { return n.load(z_old) - n.load(z); });
      now = most.of[0], old = most.of[1], old_least = -most.of[2], above = most.of[3], below = most.of[4];
    }
  };

  // Whether the old logits, over tau, are so near to each other that e^x needs no range.
  static KERNELMETA_INLINE bool is_calm(C spread) { return spread <= C(B::kSmall); }

  // e^(x / tau) of an old logit x relative to the largest one
  template <bool calm, class X>
  KERNELMETA_INLINE X cooled(X x) const {
    if constexpr (calm)
      return B::exp_small(x * cold);
    else
      return B::exp_or_zero(x * cold);
  }

  // 2 / n!
  static constexpr double share_of_factorial(int n) { return n == 2 ? 1 : share_of_factorial(n - 1) / n; }
  // e^u - 1 - u by its series, for |u| up to 1.5, or with few terms up to kTiny.
  template <bool few, class X>
  static KERNELMETA_INLINE X near_excess(X u) {
    constexpr int kTerms = few ? (kSingle ? 6 : 11) : (kSingle ? 11 : 18);
    return u * u * C(0.5) * horner<2, kTerms>(u);
  }
  template <int k, int last, class X>
  static KERNELMETA_INLINE X horner(X u) {
    constexpr C kCoefficient = C(share_of_factorial(k));
    if constexpr (k == last)
      return X{} + kCoefficient;
    else
      return horner<k + 1, last>(u) * u + kCoefficient;
  }
  template <class X>
  static KERNELMETA_INLINE X exp_excess(X u) {
    return u * u <= C(1) ? near_excess<false>(u) : B::exp(u) - C(1) - u;
  }

  KERNELMETA_INLINE C class_weight(int64_t n) const { return p.class_weight ? p.class_weight[n] : C(1); }
  template <class R_>
  KERNELMETA_INLINE C sum_of_weights(R_ row) const {
    return p.class_weight ? row.sum([&](auto n) { return n.load(p.class_weight); }) : C(p.N);
  }

  // Whether the label's logit is the largest, the first of equal ones; not where one is NaN.
  template <class R_, class F>
  static KERNELMETA_INLINE bool right(R_ row, const F* z, int64_t y, C own, C largest) {
    if (!(own == largest)) return false;
    const C no_less = row.sum([&](auto n) { return n.load(z) < own ? n.zero() : n.zero() + C(1); });
    if (no_less == C(1)) return true;
    return row.sum([&](auto n) {
      const auto z_n = n.load(z);
      return z_n < own ? n.zero() : z_n == own ? n.before(y, n.zero() + C(1), n.zero()) : n.zero() + C(1);
    }) == C(0);
  }

  // e^(z - max) of all classes but the label
  template <class F>
  static KERNELMETA_INLINE auto of_others(const F* now, int64_t y, C largest) {
    return [=](auto n) { return n.is(y, n.zero(), B::exp_or_zero(n.load(now) - largest)); };
  }

  template <class R_, class F>
  KERNELMETA_INLINE C loss_of_label(R_ row, const F* z, int64_t y, C own, C* found) const {
    const C largest = found[Row::kMax], others = found[Row::kOthers];
    const C total = others + (own == largest ? C(1) : B::exp_or_zero(own - largest));
    found[Row::kInverse] = C(1) / total;
    const C log_sum = own == largest ? B::log1p(others) : B::log(total);
    C loss = (C(1) - p.label_smoothing) * class_weight(y) * ((largest - own) + log_sum);
    if (p.label_smoothing > C(0)) {
      const C of_all = row.sum([&](auto n) {
        const auto each = (n.zero() + largest - n.load(z)) + log_sum;
        return p.class_weight ? each * n.load(p.class_weight) : each;
      });
      loss += p.label_smoothing / C(p.N) * of_all;
    }
    return loss;
  }

  // Writes the gradient of the distance, which of_distance says, and of the label's loss, where it has one:
  // e_n scale - smooth w_n, but apart for the label itself, whose 1 - q is the sum of the others.
  template <class R_, class F, class Fn>
  KERNELMETA_INLINE void add_label(const DistillationBackward<C>& f, R_ row, int64_t r, int64_t y,
                                   const F* now, C* to, const C* kept, Fn of_distance) const {
    if (!p.label_loss || f.grad_label_losses == nullptr) {
      row.each([&](auto n) { n.store(to, of_distance(n)); });
      return;
    }
    const C g = f.grad_label_losses[r], of_label = g * (C(1) - p.label_smoothing) * class_weight(y);
    const C smooth = g * p.label_smoothing / C(p.N);
    const C own_scale = smooth == C(0) ? C(0) : smooth * sum_of_weights(row) * kept[Row::kInverse];
    const C scale = of_label * kept[Row::kInverse] + own_scale;
    const C own = -of_label * (kept[Row::kOthers] * kept[Row::kInverse]), largest = kept[Row::kMax];
    row.each([&](auto n) {
      const auto e = B::exp_or_zero(n.load(now) - largest);
      n.store(to, n.is(y, e * own_scale + own, e * scale) + of_distance(n));
    });
    if (smooth != C(0)) {
      row.each([&](auto n) {
        const auto value = n.load(to);
        n.store(to, p.class_weight ? value - n.load(p.class_weight) * smooth : value - smooth);
      });
    }
  }

  static KERNELMETA_INLINE C inf() { return C(__builtin_inf()); }

  // new - old; 0 where they are equal, infinite ones too
  template <class At, class F>
  static KERNELMETA_INLINE auto apart(At n, const F* now, const F* old) {
    const auto z = n.load(now), z_old = n.load(old);
    return z == z_old ? n.zero() : z - z_old;
  }

  template <class At, class F>
  KERNELMETA_INLINE auto inhibition(At n, const F* now, const F* old) const {
    const auto d = apart(n, now, old);
    const auto over = B::max(d, d * C(-1)) - p.margin;
    const auto positive = over <= C(0) ? n.zero() : over;
    if (p.power == C(1)) return positive;
    if (p.power == C(2)) return positive * positive;
    return over <= C(0) ? n.zero() : B::pow(positive, p.power);
  }
  template <class At, class F>
  KERNELMETA_INLINE auto inhibition_gradient(At n, const F* now, const F* old) const {
    const auto d = apart(n, now, old);
    const auto over = B::max(d, d * C(-1)) - p.margin;
    const auto sign = over <= C(0) ? n.zero() : d < C(0) ? n.zero() - C(1) : n.zero() + C(1);
    if (p.power == C(1)) return over == over ? sign : over;
    if (p.power == C(2)) return sign * over * C(2);
    return over <= C(0) ? n.zero() : sign * B::pow(over, p.power - C(1)) * p.power;
  }

  // Classes without probability in the old logits count through e^u alone; NaN does. Calm rows have none.
  template <bool calm = false, class X>
  static KERNELMETA_INLINE X where_present(X probability, X z, X value) {
    if constexpr (calm)
      return value;
    else
      return probability == C(0) ? (z == z ? X{} : z) : value;
  }

  // log E_p[e^u]; e: scratch
  template <class R_, class F>
  KERNELMETA_INLINE C divergence(R_ row, const F* now, const F* old, int64_t y, const Extent& extent, C* e,
                                 C* found) const {
    const C old_max = extent.old;
    // Taken relative to the likeliest class: where p is nearly 1 for it, its v - E_p[v] is much smaller than
    // v.
    C pivot =
        row.most([&](auto n) { return n.load(old) == old_max ? n.load(now) - old_max : n.zero() - inf(); });
    if (pivot == -inf()) pivot = C(0);
    const C spread = (old_max - extent.old_least) * cold;
    found[Row::kPivot] = pivot;
    found[Row::kOldSpread] = spread;
    const auto v = [&](auto n) { return ((n.load(now) - n.load(old)) - pivot) * cold; };
    // The sum of e^(old / tau), that times v, and what the label's loss asks for.
    C sum, centre;
    const auto exponents = [&](auto calm) {
      const auto of_old = [&](auto n) {
        const auto value = cooled<calm()>(n.load(old) - old_max);
        n.store(e, value);
        return value;
      };
      const auto of_v = [&](auto n) {
        const auto of_n = n.load(e);
        return where_present<calm()>(of_n, n.load(now), of_n * v(n));
      };
      if (p.label_loss) {
        const auto sums = row.sums(of_old, of_v, of_others(now, y, extent.now));
        sum = sums.of[0], centre = sums.of[1], found[Row::kOthers] = sums.of[2];
      } else {
        const auto sums = row.sums(of_old, of_v);
        sum = sums.of[0], centre = sums.of[1];
      }
    };
    const bool calm = is_calm(spread);
    if (calm)
      exponents(Yes());
    else
      exponents(No());
    const C inverse = C(1) / sum;
    centre *= inverse;
    const C above = (extent.above - pivot) * cold - centre, below = (extent.below + pivot) * cold + centre;
    found[Row::kOldInverse] = inverse;
    found[Row::kCentre] = centre;
    if (above <= C(1) && below <= C(1) && centre * centre <= C(1)) {
      found[Row::kReach] = B::max(above, below);
      const auto of_near = [&](auto calm, auto few) {
        return B::log1p(inverse * row.sum([&](auto n) {
          const auto of_n = n.load(e);
          return where_present<calm()>(of_n, n.load(now), of_n * near_excess<few()>(v(n) - centre));
        }));
      };
      const C near = !calm                            ? of_near(No(), No())
                     : found[Row::kReach] <= C(kTiny) ? of_near(Yes(), Yes())
                                                      : of_near(Yes(), No());
      return found[Row::kDivergence] = near;
    }
    const C now_max = extent.now;
    found[Row::kNewInverse] =
        C(1) / row.sum([&](auto n) { return B::exp_or_zero((n.load(now) - now_max) * cold); });
    return found[Row::kDivergence] = far_divergence(row, now, old, sum, above, e, found);
  }

  // ... in a row whose u are not all near 0
  template <class R_, class F>
  KERNELMETA_INLINE C far_divergence(R_ row, const F* now, const F* old, C sum, C above, const C* e,
                                     const C* found) const {
    const C old_max = found[Row::kOldMax], pivot = found[Row::kPivot], centre = found[Row::kCentre];
    const C inverse = found[Row::kOldInverse];
    const auto u_of = [&](auto n) { return ((n.load(now) - n.load(old)) - pivot) * cold - centre; };
    if (above <= C(kFarthest)) {
      return B::log1p(inverse * row.sum([&](auto n) {
        const auto of_n = n.load(e);
        return where_present(of_n, n.load(now), of_n * exp_excess(u_of(n)));
      }));
    }
    if (centre == -inf()) return -centre;  // a class that the new logits alone rule out

    const C log_sum = B::log(sum);
    // log(p e^u) of classes that are far
    const auto far = [&](auto n, auto near_value, auto far_value) {
      const auto u = u_of(n);
      return u <= C(kFarthest) ? near_value(u)
                               : far_value(((n.load(now) - old_max) - pivot) * cold - (centre + log_sum));
    };
    const C largest = row.most(
        [&](auto n) { return far(n, [&](auto) { return n.zero(); }, [](auto log_q) { return log_q; }); });
    if (largest > C(kLargest)) {
      return largest + B::log(row.sum([&](auto n) {
               return far(
                   n, [&](auto) { return n.zero(); },
                   [&](auto log_q) { return B::exp_or_zero(log_q - largest); });
             }));
    }
    return B::log1p(row.sum([&](auto n) {
      const auto probability = n.load(e) * inverse;
      const auto z = n.load(now);
      const auto u = u_of(n);
      return far(
          n, [&](auto) { return where_present(probability, z, probability * exp_excess(u)); },
          [&](auto log_q) {
            return B::exp_or_zero(log_q) - where_present(probability, z, probability * (u + C(1)));
          });
    }));
  }

  // q - p: where the exponent is not near 0, q and p differ enough to be subtracted; where the centre is
  // not, v - centre has lost more digits than that would.
  template <class At, class F>
  KERNELMETA_INLINE auto divergence_gradient(At n, const F* now, const F* old, const C* kept) const {
    const auto z = n.load(now), z_old = n.load(old);
    const auto probability = B::exp_or_zero((z_old - kept[Row::kOldMax]) * cold) * kept[Row::kOldInverse];
    const auto v = ((z - z_old) - kept[Row::kPivot]) * cold;
    const auto shifted = v - kept[Row::kCentre] - kept[Row::kDivergence];
    const auto apart = B::exp_or_zero((z - kept[Row::kMax]) * cold) * kept[Row::kNewInverse] - probability;
    const C centre = kept[Row::kCentre];
    return shifted * shifted + centre * centre <= C(1) ? probability * (shifted + near_excess<false>(shifted))
                                                       : apart;
  }
};

}  // namespace kernelmeta
