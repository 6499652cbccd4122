// Oracles: where a step's G = d loss / d Z comes from, and how a gradient of G finds its way back to Z.
//
// One struct an oracle, `forward` and its derivative `backward` beside it, in Block's words, used by all
// backends; docs/programs.md says how to add one. Rows are innermost: z, g, gg and gz are [N][ld] of the
// phase's rows. `columns(rows, f)` calls f(at) for every row (or vector of rows), which walks over the N
// classes by itself. The synthetic-gradient MLP, which has parameters, stands in mlp.h. `Oracles`, at the
// end, lists them all: one that is not there does not compile.
#pragma once

#include "engine/arena.h"

namespace kernelmeta {

// The numbers are those of kernelmeta/phases.py.
enum class Oracle : int64_t {
  kCrossEntropy = 0,
  kSquaredError = 1,
  kHinge = 2,
  kEntropy = 3,
  kSoftAssignment = 4,
  kSyntheticGradient = 5,
  kEquivariantGradient = 6,
  kProportions = 7,
  kAssignment = 8,
  kMarginalEntropy = 9,
  kEnd  // their number
};

// What an oracle may look at besides Z.
template <class B>
struct OracleRows {
  using C = typename B::Scalar;

  B& block;
  int64_t N, rows, ld;
  const C* y;      // [N][ld] one-hot labels, zeros in the padding; null where the rows have none
  C share, count;  // the loss is share = 1 / count times the sum over rows
  C target;        // of squared error: what a row's own class should get
};

// p = softmax(z) of one row; returns log sum exp(z).
template <class B, class At>
KERNELMETA_INLINE auto softmax(At at, int64_t N, int64_t ld, const typename B::Scalar* z,
                               typename B::Scalar* p) {
  auto top = at.load(z);
  for (int64_t n = 1; n < N; ++n) top = B::max(top, at.load(z + n * ld));
  auto sum = at.zero();
  for (int64_t n = 0; n < N; ++n) {
    const auto e = B::exp(at.load(z + n * ld) - top);
    at.store(p + n * ld, e);
    sum = sum + e;
  }
  const auto inverse = typename B::Scalar(1) / sum;
  for (int64_t n = 0; n < N; ++n) at.store(p + n * ld, at.load(p + n * ld) * inverse);
  return top + B::log(sum);
}

// gz = (d softmax / dz)^T gp = p (gp - <p, gp>), times `share`; p and gz may be one array.
template <class B, class At>
KERNELMETA_INLINE void softmax_backward(At at, int64_t N, int64_t ld, const typename B::Scalar* p,
                                        const typename B::Scalar* gp, typename B::Scalar share,
                                        typename B::Scalar* gz) {
  auto along = at.zero();
  for (int64_t n = 0; n < N; ++n) along = along + at.load(p + n * ld) * at.load(gp + n * ld);
  for (int64_t n = 0; n < N; ++n) {
    at.store(gz + n * ld, at.load(p + n * ld) * (at.load(gp + n * ld) - along) * share);
  }
}

// -log softmax(z)[y].  G = (softmax(z) - y) share.
struct CrossEntropy {
  static constexpr Oracle kOracle = Oracle::kCrossEntropy;
  static constexpr const char* kName = "cross_entropy";
  static constexpr bool kNeedsLabels = true;

  template <class B, class C>
  KERNELMETA_INLINE static void forward(const OracleRows<B>& r, const C* z, C* g) {
    r.block.columns(r.rows, [&](auto at) {
      softmax<B>(at, r.N, r.ld, z, g);
      for (int64_t n = 0; n < r.N; ++n) {
        at.store(g + n * r.ld, (at.load(g + n * r.ld) - at.load(r.y + n * r.ld)) * r.share);
      }
    });
  }

  template <class B, class C>
  KERNELMETA_INLINE static void backward(const OracleRows<B>& r, const C*, const C* g, const C* gg, C* gz) {
    r.block.columns(r.rows, [&](auto at) {
      for (int64_t n = 0; n < r.N; ++n) {
        at.store(gz + n * r.ld, at.load(g + n * r.ld) * r.count + at.load(r.y + n * r.ld));  // softmax(z)
      }
      softmax_backward<B>(at, r.N, r.ld, gz, gg, r.share, gz);
    });
  }
};

// |z - target y|^2 / 2.  G = (z - target y) share.
struct SquaredError {
  static constexpr Oracle kOracle = Oracle::kSquaredError;
  static constexpr const char* kName = "squared_error";
  static constexpr bool kNeedsLabels = true;

  template <class B, class C>
  KERNELMETA_INLINE static void forward(const OracleRows<B>& r, const C* z, C* g) {
    r.block.columns(r.rows, [&](auto at) {
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        at.store(g + i, (at.load(z + i) - at.load(r.y + i) * r.target) * r.share);
      }
    });
  }

  template <class B, class C>
  KERNELMETA_INLINE static void backward(const OracleRows<B>& r, const C*, const C*, const C* gg, C* gz) {
    r.block.columns(r.rows, [&](auto at) {
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) at.store(gz + i, at.load(gg + i) * r.share);
    });
  }
};

// sum over n other than y of max(0, 1 + z[n] - z[y]) (Weston & Watkins 1998). Its G is constant between
// kinks: the derivative is zero.
struct Hinge {
  static constexpr Oracle kOracle = Oracle::kHinge;
  static constexpr const char* kName = "hinge";
  static constexpr bool kNeedsLabels = true;

  template <class B, class C>
  KERNELMETA_INLINE static void forward(const OracleRows<B>& r, const C* z, C* g) {
    r.block.columns(r.rows, [&](auto at) {
      auto own = at.zero(), violations = at.zero();
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) own = own + at.load(z + i) * at.load(r.y + i);
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        const auto margin = at.load(z + i) - own + C(1);
        const auto violated = B::where_positive(margin, at.zero() + (C(1) - at.load(r.y + i)));
        at.store(g + i, violated);
        violations = violations + violated;
      }
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        at.store(g + i, (at.load(g + i) - at.load(r.y + i) * violations) * r.share);
      }
    });
  }

  template <class B, class C>
  KERNELMETA_INLINE static void backward(const OracleRows<B>& r, const C*, const C*, const C*, C* gz) {
    r.block.columns(r.rows, [&](auto at) {
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) at.store(gz + i, at.zero());
    });
  }
};

// The entropy of p = softmax(z).  With h = log p + entropy(p), G = -p h share.
struct Entropy {
  static constexpr Oracle kOracle = Oracle::kEntropy;
  static constexpr const char* kName = "entropy";
  static constexpr bool kNeedsLabels = false;

  template <class B, class C>
  KERNELMETA_INLINE static void forward(const OracleRows<B>& r, const C* z, C* g) {
    r.block.columns(r.rows, [&](auto at) {
      const auto log_sum = softmax<B>(at, r.N, r.ld, z, g);
      auto entropy = at.zero();
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        entropy = entropy - at.load(g + i) * (at.load(z + i) - log_sum);
      }
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        at.store(g + i, at.load(g + i) * (log_sum - at.load(z + i) - entropy) * r.share);
      }
    });
  }

  // gz = -p ((gg - <p, gg>) (h + 1) - <gg, p h>) share
  template <class B, class C>
  KERNELMETA_INLINE static void backward(const OracleRows<B>& r, const C* z, const C*, const C* gg, C* gz) {
    r.block.columns(r.rows, [&](auto at) {
      const auto log_sum = softmax<B>(at, r.N, r.ld, z, gz);
      auto entropy = at.zero(), mean = at.zero(), along = at.zero();
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        entropy = entropy - at.load(gz + i) * (at.load(z + i) - log_sum);
      }
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        const auto weighted = at.load(gz + i) * at.load(gg + i);
        mean = mean + weighted;
        along = along + weighted * (at.load(z + i) - log_sum + entropy);
      }
      for (int64_t i = 0; i < r.N * r.ld; i += r.ld) {
        const auto h = at.load(z + i) - log_sum + entropy;
        at.store(gz + i, at.load(gz + i) * (along - (at.load(gg + i) - mean) * (h + C(1))) * r.share);
      }
    });
  }
};

// p = softmax(z) itself: not a gradient, but what soft k-means moves its centres with (program.h).
struct SoftAssignment {
  static constexpr Oracle kOracle = Oracle::kSoftAssignment;
  static constexpr const char* kName = "soft_assignment";
  static constexpr bool kNeedsLabels = false;

  template <class B, class C>
  KERNELMETA_INLINE static void forward(const OracleRows<B>& r, const C* z, C* p) {
    r.block.columns(r.rows, [&](auto at) { softmax<B>(at, r.N, r.ld, z, p); });
  }

  template <class B, class C>
  KERNELMETA_INLINE static void backward(const OracleRows<B>& r, const C*, const C* p, const C* gp, C* gz) {
    r.block.columns(r.rows, [&](auto at) { softmax_backward<B>(at, r.N, r.ld, p, gp, C(1), gz); });
  }
};

// An MLP's guess (mlp.h): it has parameters, so that whoever asks it does not come here.
struct SyntheticGradient {
  static constexpr Oracle kOracle = Oracle::kSyntheticGradient;
  static constexpr const char* kName = "synthetic_gradient";
  static constexpr bool kNeedsLabels = false;
  using AnsweredElsewhere = void;
};

// The same, by an MLP that looks at pairs of a row and a class (pair_inputs.h).
struct EquivariantGradient {
  static constexpr Oracle kOracle = Oracle::kEquivariantGradient;
  static constexpr const char* kName = "equivariant_gradient";
  static constexpr bool kNeedsLabels = false;
  using AnsweredElsewhere = void;
};

// Those that know the classes' shares of the rows (marginals.h).
struct Proportions {
  static constexpr Oracle kOracle = Oracle::kProportions;
  static constexpr const char* kName = "proportions";
  static constexpr bool kNeedsLabels = false;
  using AnsweredElsewhere = void;
};

struct Assignment {
  static constexpr Oracle kOracle = Oracle::kAssignment;
  static constexpr const char* kName = "assignment";
  static constexpr bool kNeedsLabels = false;
  using AnsweredElsewhere = void;
};

// The entropy of the mean prediction (marginals.h).
struct MarginalEntropy {
  static constexpr Oracle kOracle = Oracle::kMarginalEntropy;
  static constexpr const char* kName = "marginal_entropy";
  static constexpr bool kNeedsLabels = false;
  using AnsweredElsewhere = void;
};

template <class... Each>
struct OracleList {
  static constexpr int64_t kCount = sizeof...(Each);

  static constexpr bool in_order() {
    int64_t number = 0;
    return ((int64_t(Each::kOracle) == number++) && ...);
  }
  static constexpr bool needs_labels(Oracle oracle) {
    return ((oracle == Each::kOracle && Each::kNeedsLabels) || ...);
  }
  // f(the oracle's struct), unless others answer for it
  template <class F>
  KERNELMETA_INLINE static void with(Oracle oracle, F f) {
    ((oracle == Each::kOracle ? one<Each>(f) : void()), ...);
  }

 private:
  template <class One, class F>
  KERNELMETA_INLINE static void one(F f) {
    if constexpr (!requires { typename One::AnsweredElsewhere; }) f(One{});
  }
};

// In the order of enum Oracle, and of ORACLES in kernelmeta/phases.py.
using Oracles = OracleList<CrossEntropy, SquaredError, Hinge, Entropy, SoftAssignment, SyntheticGradient,
                           EquivariantGradient, Proportions, Assignment, MarginalEntropy>;
static_assert(Oracles::in_order() && Oracles::kCount == int64_t(Oracle::kEnd),
              "every oracle of the enum has its struct in the list, in the same order");

constexpr int64_t kOracles = Oracles::kCount;
// Made of softmax(z) or of differences: one number added to all z changes nothing, and gz sums to zero but
// for rounding.
constexpr bool blind_to_shift(Oracle oracle) {
  return oracle == Oracle::kCrossEntropy || oracle == Oracle::kHinge || oracle == Oracle::kEntropy ||
         oracle == Oracle::kSoftAssignment || oracle == Oracle::kEquivariantGradient ||
         oracle == Oracle::kProportions || oracle == Oracle::kAssignment ||
         oracle == Oracle::kMarginalEntropy;
}
constexpr bool needs_labels(Oracle oracle) { return Oracles::needs_labels(oracle); }

template <class F>
KERNELMETA_INLINE void with_oracle(Oracle oracle, F f) {
  Oracles::with(oracle, f);
}

}  // namespace kernelmeta
