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
  // e^x is taken for 0 below, before it is a number without all its digits.
  static constexpr double kLowest = kSingle ? -87 : -708;
  // u beyond which classes are far, and log(p e^u) beyond which its sum is shifted.
  static constexpr double kFarthest = 20, kLargest = kSingle ? 60 : 600;

  B& block;
  const DistillationProblem<C>& p;
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
          found[Row::kMax] = row.most([&](auto n) { return n.load(now); });
          found[Row::kOldMax] = row.most([&](auto n) { return n.load(old); });
          const bool old_right = right(row, old, y, found[Row::kOldMax]);
          code =
              kCounted + (old_right ? kOldRight : 0) + (right(row, now, y, found[Row::kMax]) ? kNewRight : 0);
          found[Row::kFocus] = old_right ? p.alpha + p.beta : p.alpha;
          if (p.label_loss) label_loss = loss_of_label(row, now, y, found);
          distance = found[Row::kFocus] * distance_of(row, now, old, exponentials + i * padded(p.N), found);
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
      const C along = f.grad_distances[r] * kept[Row::kFocus] * p.share();
      // g_n = own e_n + other - smooth w_n of the label's loss: apart for the label itself, whose 1 - q is
      // the sum of the others.
      C scale = 0, own_scale = 0, own = 0, smooth = 0;
      const bool labelled = p.label_loss && f.grad_label_losses != nullptr;
      if (labelled) {
        const C g = f.grad_label_losses[r], of_label = g * (C(1) - p.label_smoothing) * class_weight(y);
        smooth = g * p.label_smoothing / C(p.N);
        own_scale = smooth == C(0) ? C(0) : smooth * sum_of_weights(row) * kept[Row::kInverse];
        scale = of_label * kept[Row::kInverse] + own_scale;
        own = -of_label * (kept[Row::kOthers] * kept[Row::kInverse]);
      }
      const C largest = kept[Row::kMax];
      const auto part = [&](int64_t from, int64_t n_classes, C e_scale, C constant) {
        const auto* z = now + from;
        const auto* z_old = old + from;
        const auto of_label = [&](auto n) {
          auto value = n.zero() + constant;
          if (!labelled) return value;
          value = value + exp_or_zero(n.load(z) - largest) * e_scale;
          if (smooth != C(0)) {
            value = p.class_weight ? value - n.load(p.class_weight + from) * smooth : value - smooth;
          }
          return value;
        };
        const auto each = [&](auto of_distance) {
          row.part(from, n_classes).each([&](auto n) { n.store(to + from, of_label(n) + of_distance(n)); });
        };
        if (p.divergence()) {
          if (kept[Row::kNewInverse] == C(0))
            each([&](auto n) { return near_gradient(n, z, z_old, kept) * (along * p.tau); });
          else
            each([&](auto n) { return divergence_gradient(n, z, z_old, kept) * (along * p.tau); });
        } else if (p.squared()) {
          each([&](auto n) { return apart(n, z, z_old) * along; });
        } else {
          each([&](auto n) { return inhibition_gradient(n, z, z_old) * along; });
        }
      };
      // What is before the label, the label, what is after it.
      for (int k = 0; k < 3; ++k) {
        const int64_t from = k == 0 ? 0 : y + k - 1, to_here = k == 0 ? y : k == 1 ? y + 1 : p.N;
        part(from, to_here - from, k == 1 ? own_scale : scale, k == 1 ? own : C(0));
      }
    });
  }

 private:
  template <class X>
  static KERNELMETA_INLINE X exp_or_zero(X x) {
    return x < C(kLowest) ? X{} : B::exp(x);
  }

  // e^u - 1 - u by its series, for |u| up to 1.5
  template <class X>
  static KERNELMETA_INLINE X near_excess(X u) {
    X sum = X{} + C(1);
    for (int k = kSingle ? 11 : 18; k > 2; --k) sum = sum * u * C(1.0 / k) + C(1);
    return u * u * C(0.5) * sum;
  }
  template <class X>
  static KERNELMETA_INLINE X exp_excess(X u) {
    return u * u <= C(1) ? near_excess(u) : B::exp(u) - C(1) - u;
  }

  KERNELMETA_INLINE C class_weight(int64_t n) const { return p.class_weight ? p.class_weight[n] : C(1); }
  template <class R_>
  KERNELMETA_INLINE C sum_of_weights(R_ row) const {
    return p.class_weight ? row.sum([&](auto n) { return n.load(p.class_weight); }) : C(p.N);
  }

  // Whether the label's logit is the largest, the first of equal ones; not where one is NaN.
  template <class R_, class F>
  KERNELMETA_INLINE bool right(R_ row, const F* z, int64_t y, C largest) const {
    const C own = row.part(y, 1).sum([&](auto n) { return n.load(z + y); });
    if (!(own == largest)) return false;
    const C before = row.part(0, y).sum([&](auto n) { return n.load(z) < own ? n.zero() : n.zero() + C(1); });
    const C after = row.part(y + 1, p.N - y - 1).sum([&](auto n) {
      return n.load(z + y + 1) <= own ? n.zero() : n.zero() + C(1);
    });
    return before + after == C(0);
  }

  template <class R_, class F>
  KERNELMETA_INLINE C loss_of_label(R_ row, const F* z, int64_t y, C* found) const {
    const C largest = found[Row::kMax];
    const auto sum = [&](int64_t from, int64_t count) {
      return row.part(from, count).sum([&](auto n) { return exp_or_zero(n.load(z + from) - largest); });
    };
    const C own = row.part(y, 1).sum([&](auto n) { return n.load(z + y); });
    const C others = sum(0, y) + sum(y + 1, p.N - y - 1), total = others + sum(y, 1);
    found[Row::kOthers] = others;
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

  template <class R_, class F>
  KERNELMETA_INLINE C distance_of(R_ row, const F* now, const F* old, C* e, C* found) const {
    if (p.divergence()) {
      found[Row::kDivergence] = divergence(row, now, old, e, found);
      return p.tau * p.tau * found[Row::kDivergence];
    }
    const C sum = p.squared() ? row.sum([&](auto n) {
      const auto d = apart(n, now, old);
      return d * d * C(0.5);
    })
                              : row.sum([&](auto n) { return inhibition(n, now, old); });
    return sum * p.share();
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

  // Classes without probability in the old logits count through e^u alone; NaN does.
  template <class X>
  static KERNELMETA_INLINE X where_present(X probability, X z, X value) {
    return probability == C(0) ? (z == z ? X{} : z) : value;
  }

  // log E_p[e^u]; e: scratch
  template <class R_, class F>
  KERNELMETA_INLINE C divergence(R_ row, const F* now, const F* old, C* e, C* found) const {
    const C cold = C(1) / p.tau, old_max = found[Row::kOldMax];
    const C sum = row.sum([&](auto n) {
      const auto value = exp_or_zero((n.load(old) - old_max) * cold);
      n.store(e, value);
      return value;
    });
    const C inverse = C(1) / sum;
    // Taken relative to the likeliest class: where p is nearly 1 for it, its v - E_p[v] is much smaller than
    // v.
    C pivot =
        row.most([&](auto n) { return n.load(old) == old_max ? n.load(now) - old_max : n.zero() - inf(); });
    if (pivot == -inf()) pivot = C(0);
    found[Row::kPivot] = pivot;
    const auto v = [&](auto n) { return ((n.load(now) - n.load(old)) - pivot) * cold; };
    const C centre = inverse * row.sum([&](auto n) {
      const auto of_n = n.load(e);
      return where_present(of_n, n.load(now), of_n * v(n));
    });
    const C above = row.most(v) - centre, below = row.most([&](auto n) { return v(n) * C(-1); }) + centre;
    found[Row::kOldInverse] = inverse;
    found[Row::kCentre] = centre;
    const auto sum_of = [&](auto excess) {
      return B::log1p(inverse * row.sum([&](auto n) {
        const auto of_n = n.load(e);
        return where_present(of_n, n.load(now), of_n * excess(v(n) - centre));
      }));
    };
    if (above <= C(1) && below <= C(1) && centre * centre <= C(1))
      return sum_of([](auto u) { return near_excess(u); });

    const C now_max = found[Row::kMax];
    found[Row::kNewInverse] =
        C(1) / row.sum([&](auto n) { return exp_or_zero((n.load(now) - now_max) * cold); });
    if (above <= C(kFarthest)) return sum_of([](auto u) { return exp_excess(u); });
    if (centre == -inf()) return -centre;  // a class that the new logits alone rule out

    const C log_sum = B::log(sum);
    // log(p e^u) of classes that are far
    const auto far = [&](auto n, auto near_value, auto far_value) {
      const auto u = v(n) - centre;
      return u <= C(kFarthest) ? near_value(u)
                               : far_value(((n.load(now) - old_max) - pivot) * cold - (centre + log_sum));
    };
    const C largest = row.most(
        [&](auto n) { return far(n, [&](auto) { return n.zero(); }, [](auto log_q) { return log_q; }); });
    if (largest > C(kLargest)) {
      return largest + B::log(row.sum([&](auto n) {
               return far(
                   n, [&](auto) { return n.zero(); },
                   [&](auto log_q) { return exp_or_zero(log_q - largest); });
             }));
    }
    return B::log1p(row.sum([&](auto n) {
      const auto probability = n.load(e) * inverse;
      const auto z = n.load(now);
      const auto u = v(n) - centre;
      return far(
          n, [&](auto) { return where_present(probability, z, probability * exp_excess(u)); },
          [&](auto log_q) {
            return exp_or_zero(log_q) - where_present(probability, z, probability * (u + C(1)));
          });
    }));
  }

  // p (e^(u - divergence) - 1) = q - p, in a row whose u are all near 0
  template <class At, class F>
  KERNELMETA_INLINE auto near_gradient(At n, const F* now, const F* old, const C* kept) const {
    const C cold = C(1) / p.tau;
    const auto z = n.load(now), z_old = n.load(old);
    const auto probability = exp_or_zero((z_old - kept[Row::kOldMax]) * cold) * kept[Row::kOldInverse];
    const auto v = ((z - z_old) - kept[Row::kPivot]) * cold;
    const auto shifted = v - kept[Row::kCentre] - kept[Row::kDivergence];
    return where_present(probability, z, probability * (shifted + near_excess(shifted)));
  }
  // ... in any: where the exponent is not near 0, q and p differ enough to be subtracted; where the centre is
  // not, v - centre has lost more digits than that would.
  template <class At, class F>
  KERNELMETA_INLINE auto divergence_gradient(At n, const F* now, const F* old, const C* kept) const {
    const C cold = C(1) / p.tau;
    const auto z = n.load(now), z_old = n.load(old);
    const auto probability = exp_or_zero((z_old - kept[Row::kOldMax]) * cold) * kept[Row::kOldInverse];
    const auto v = ((z - z_old) - kept[Row::kPivot]) * cold;
    const auto shifted = v - kept[Row::kCentre] - kept[Row::kDivergence];
    const auto apart = exp_or_zero((z - kept[Row::kMax]) * cold) * kept[Row::kNewInverse] - probability;
    const C centre = kept[Row::kCentre];
    return shifted * shifted + centre * centre <= C(1) ? probability * (shifted + near_excess(shifted))
                                                       : apart;
  }
};

}  // namespace kernelmeta
