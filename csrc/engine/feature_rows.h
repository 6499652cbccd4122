// Rows of features, and their norms.
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

inline constexpr double kNormFloor = 1e-12;  // lower bound of |x| and |theta|, as in F.normalize

// Rows of one task's features, or of a bank that `index` points into.
template <class F>
struct FeatureRows {
  const F* data;
  int64_t stride;        // in elements
  const int64_t* index;  // null: row i is row i

  KERNELMETA_INLINE const F* operator()(int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// Rows of one kind, support or query: where they stand among the live rows, those that a task's steps look
// at. `first` is a multiple of kAlign, so that every part of an array can be read in vectors; between the
// parts, and in all padding, arrays of live rows hold zeros.
struct RowRange {
  int64_t first, count;

  KERNELMETA_INLINE int64_t ld() const { return padded(count); }
};

template <class C>
struct Extremes {
  static constexpr double kLargest = sizeof(C) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  static constexpr double kSmallest = sizeof(C) == 4 ? 1.1754943508222875e-38 : 2.2250738585072014e-308;
  // Brings squares of what is too large for a square into range, and is a power of two.
  static constexpr double kShrink =
      sizeof(C) == 4 ? 1.0 / (1ull << 48) / (1ull << 48)
                     : 1.0 / (1ull << 60) / (1ull << 60) / (1ull << 60) / (1ull << 60) / (1ull << 60) /
                           (1ull << 60) / (1ull << 60) / (1ull << 60) / (1ull << 60) / (1ull << 60);
};

// |theta|^2 from the sum of squares, at least the floor's; NaN where it is beyond the largest number.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE C floored_square(C squares) {
  const C floor = C(kNormFloor);
  return squares <= C(Extremes<C>::kLargest) ? B::max(squares, floor * floor) : C(__builtin_nan(""));
}

// Whether products of rows with this squared norm (of the sum as it was computed) may be beyond what numbers
// hold; NaN is.
template <class C>
KERNELMETA_INLINE bool out_of_range(C squares) {
  const C floor = C(kNormFloor);
  return squares != C(0) && !(squares > floor * floor && squares <= C(Extremes<C>::kLargest));
}

// Whether |theta| is at the floor, from its square: there the cosine is linear in theta, and its gradient the
// whole pull.
template <class C>
KERNELMETA_INLINE bool theta_at_floor(C r2) {
  const C floor = C(kNormFloor);
  return !(r2 > floor * floor);
}

// Whether |x| is at the floor: there xhat = x / kNormFloor, and |x| is no part of its derivative. From 1 /
// |x|.
template <class C>
KERNELMETA_INLINE bool at_floor(C inverse) {
  return !(inverse < C(1) / C(kNormFloor));
}

// 1 / max(|x|, kNormFloor) of row x of features, which `row` is; also where |x|^2 is beyond the largest
// number. NaN where |x| itself is, or nearly.
template <class B, class Row, class F, class C = typename B::Scalar>
KERNELMETA_INLINE C inverse_norm(Row row, const F* x) {
  const C squares = row.sum([&](auto d) { return d.load(x) * d.load(x); });
  if (squares <= C(Extremes<C>::kLargest)) return C(1) / B::max(B::sqrt(squares), C(kNormFloor));
  constexpr C kShrink = C(Extremes<C>::kShrink);
  const C shrunk = row.sum([&](auto d) { return (d.load(x) * kShrink) * (d.load(x) * kShrink); });
  const C inverse = kShrink / B::sqrt(shrunk);
  return inverse >= C(Extremes<C>::kSmallest) ? inverse : C(__builtin_nan(""));
}

// x / |x| at d, given 1 / |x|. A single feature is divided by itself: it leaves a sign, and no rounding.
template <class B, class At, class F, class C = typename B::Scalar>
KERNELMETA_INLINE auto unit_at(At d, const F* x, C inverse, bool one_feature) {
  const auto value = d.load(x);
  if (!one_feature) return value * inverse;
  return value / B::max(B::max(value, value * C(-1)), d.zero() + C(kNormFloor));
}

// to [count][D] = the normalised rows; inverse: 1 / |x|. No barrier.
template <class B, class F, class C = typename B::Scalar>
KERNELMETA_INLINE void normalise_rows(B& block, const FeatureRows<F>& rows, int64_t count, int64_t D,
                                      const C* inverse, C* to) {
  block.unfenced().features(count, D, [&](int64_t i, auto row) {
    const F* x = rows(i);
    row.each([&](auto d) { d.store(to + i * D, unit_at<B>(d, x, inverse[i], D == 1)); });
  });
}

// Gradients of normalised rows, g [count][D] -> of the rows themselves. unit: see normalise_rows.
template <class B, class C = typename B::Scalar>
KERNELMETA_INLINE void through_norms(B& block, const C* unit, const C* inverse, int64_t count, int64_t D,
                                     C* g) {
  block.unfenced().features(count, D, [&](int64_t i, auto row) {
    const C* xhat = unit + i * D;
    C* to = g + i * D;
    const C along = at_floor(inverse[i]) ? C(0) : row.sum([&](auto d) { return d.load(xhat) * d.load(to); });
    row.each([&](auto d) { d.store(to, (d.load(to) - d.load(xhat) * along) * inverse[i]); });
  });
}

}  // namespace kernelmeta
