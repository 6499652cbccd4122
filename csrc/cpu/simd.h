// One vector type for every instruction set: GCC's and Clang's vector extensions, as wide as the registers
// of the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "engine/portability.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kernelmeta {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// A vector is stored and loaded as its elements are: stores of vectors, as those of numbers, touch nothing of
// another type, so that loops may keep sizes and pointers in registers.
template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <class C>
inline constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class C>
__forceinline__ typename Simd<C>::V load(const C* p) {
  return *reinterpret_cast<const typename Simd<C>::Unaligned*>(p);
}

template <class C>
__forceinline__ void store(C* p, typename Simd<C>::V v) {
  *reinterpret_cast<typename Simd<C>::Unaligned*>(p) = v;
}

// True in the lanes before `count`, which may be anything.
template <class C>
__forceinline__ typename Simd<C>::Mask lanes_before(int64_t count) {
  typename Simd<C>::Mask lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = i;
  const int64_t limit = count < 0 ? 0 : count < kLanes<C> ? count : kLanes<C>;
  return lane < lane * 0 + static_cast<decltype(lane[0] + 0)>(limit);
}

// The first `count` lanes from memory, zeros in the others; reads no byte beyond them.
template <class C>
__forceinline__ typename Simd<C>::V load_first(const C* p, int64_t count) {
#if defined(__AVX512F__)
  const unsigned first = (1u << count) - 1;
  if constexpr (sizeof(C) == 4)
    return _mm512_maskz_loadu_ps(__mmask16(first), p);
  else
    return _mm512_maskz_loadu_pd(__mmask8(first), p);
#elif defined(__AVX2__)
  const auto first = reinterpret_cast<__m256i>(lanes_before<C>(count));
  if constexpr (sizeof(C) == 4)
    return _mm256_maskload_ps(p, first);
  else
    return _mm256_maskload_pd(p, first);
#else
  typename Simd<C>::V v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

template <class C>
__forceinline__ void store_first(C* p, typename Simd<C>::V v, int64_t count) {
#if defined(__AVX512F__)
  const unsigned first = (1u << count) - 1;
  if constexpr (sizeof(C) == 4)
    _mm512_mask_storeu_ps(p, __mmask16(first), v);
  else
    _mm512_mask_storeu_pd(p, __mmask8(first), v);
#elif defined(__AVX2__)
  const auto first = reinterpret_cast<__m256i>(lanes_before<C>(count));
  if constexpr (sizeof(C) == 4)
    _mm256_maskstore_ps(p, first, v);
  else
    _mm256_maskstore_pd(p, first, v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// v in the lanes from `count` on, zeros before.
template <class C>
__forceinline__ typename Simd<C>::V drop_first(typename Simd<C>::V v, int64_t count) {
  return lanes_before<C>(count) ? typename Simd<C>::V{} : v;
}

// v in the first `count` lanes, zeros in the others (whatever v holds there, NaN too).
template <class C>
__forceinline__ typename Simd<C>::V keep_first(typename Simd<C>::V v, int64_t count) {
  return lanes_before<C>(count) ? v : typename Simd<C>::V{};
}

// x in every lane. (x + 0 would be an addition, since -0 + 0 is not -0.)
template <class C>
__forceinline__ typename Simd<C>::V all_lanes(C x) {
  return x - typename Simd<C>::V{};
}

template <int... I>
struct Indices {};

template <int n, int... I>
struct MakeIndices : MakeIndices<n - 1, n - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Of a in the lanes whose number has no bit d, of b in the others: its own lane, or the one that lies d
// further or before.
template <int d, class V, int... I>
__forceinline__ V own_lanes(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I & d ? I + int(sizeof...(I)) : I)...);
}
template <int d, class V, int... I>
__forceinline__ V other_lanes(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I & d ? (I ^ d) + int(sizeof...(I)) : I ^ d)...);
}

// Lane i of the result is the sum of the lanes of v[i]; v is destroyed. A tree: lanes - 1 additions of
// vectors, each of which puts two vectors into one.
template <class C, int d = 1>
__forceinline__ typename Simd<C>::V sum_each(typename Simd<C>::V* v) {
  constexpr int W = kLanes<C>;
  using Lanes = typename MakeIndices<W>::type;
  if constexpr (d == W) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < W / (2 * d); ++i) {
      v[i] = own_lanes<d>(v[2 * i], v[2 * i + 1], Lanes{}) + other_lanes<d>(v[2 * i], v[2 * i + 1], Lanes{});
    }
    return sum_each<C, 2 * d>(v);
  }
}

// Neighbouring lanes added: the sums of a's pairs, then those of b's.
template <class V, int... I>
__forceinline__ V add_pairs(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

template <class C>
__forceinline__ C sum_lanes(typename Simd<C>::V v) {
  using Lanes = typename MakeIndices<kLanes<C>>::type;
#pragma GCC unroll 8
  for (int n = kLanes<C>; n > 1; n /= 2) v = add_pairs(v, v, Lanes{});
  return v[0];
}

// The largest lane; none may be NaN.
template <class C>
__forceinline__ C most_lane(typename Simd<C>::V v) {
  C largest = v[0];
  for (int i = 1; i < kLanes<C>; ++i) largest = largest < v[i] ? v[i] : largest;
  return largest;
}

// The lanes of a and b by turns, within every 16 bytes: of their low halves or of their high ones.
template <bool high, class V, int... I>
__forceinline__ V interleave(V a, V b, Indices<I...>) {
  constexpr int n = int(sizeof...(I)), in16 = 16 / int(sizeof(a[0]));
  return __builtin_shufflevector(a, b,
                                 (I / in16 * in16 + (high ? in16 / 2 : 0) + I % in16 / 2 + I % 2 * n)...);
}
// What a and b, rows d apart of a square, are once its quarters have changed places: of both the lanes whose
// number has no bit d, or those that have it.
template <int d, bool high, class V, int... I>
__forceinline__ V exchange(V a, V b, Indices<I...>) {
  constexpr int n = int(sizeof...(I));
  return __builtin_shufflevector(a, b, ((high ? I | d : I & ~d) + (I & d ? n : 0))...);
}

// Rounds of transposing a square of vectors. Within 16 bytes, where instructions are cheapest, lanes of
// vectors half a group apart are interleaved, so that a group of as many vectors as lanes fit into 16 bytes
// is a row of small squares, each transposed ...
template <class C, int round = 1>
__forceinline__ void transpose_within(typename Simd<C>::V* v) {
  constexpr int W = kLanes<C>, group = 16 / int(sizeof(C));
  using Lanes = typename MakeIndices<W>::type;
  if constexpr (round < group) {
    typename Simd<C>::V next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      const int first = i / (group / 2) * group, at = i % (group / 2);
      next[first + 2 * at] = interleave<false>(v[first + at], v[first + at + group / 2], Lanes{});
      next[first + 2 * at + 1] = interleave<true>(v[first + at], v[first + at + group / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
    transpose_within<C, 2 * round>(v);
  }
}
// ... and the small squares change places, two by two.
template <class C, int d = 16 / int(sizeof(C))>
__forceinline__ void transpose_across(typename Simd<C>::V* v) {
  constexpr int W = kLanes<C>;
  using Lanes = typename MakeIndices<W>::type;
  if constexpr (d < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & d) continue;
      const auto a = v[i], b = v[i + d];
      v[i] = exchange<d, false>(a, b, Lanes{});
      v[i + d] = exchange<d, true>(a, b, Lanes{});
    }
    transpose_across<C, 2 * d>(v);
  }
}

// to[j][i] = lane j of row(i), a vector's width both ways.
template <class C, class Row>
__forceinline__ void transpose(Row row, C* to, int64_t ld_to) {
  constexpr int W = kLanes<C>;
  typename Simd<C>::V v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = row(i);
  transpose_within<C>(v);
  transpose_across<C>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * ld_to, v[i]);
}

// Up to it expm1_small takes |x|: ln(2) / 2, rounded down.
inline constexpr double kSmallExponent = 0.3465;

// e^x - 1 of a small x: the Taylor series, whose next term is below the rounding of 1.
template <class C>
__forceinline__ typename Simd<C>::V expm1_small(typename Simd<C>::V x) {
  constexpr bool single = sizeof(C) == 4;
  auto sum = typename Simd<C>::V{} + (single ? C(1.0 / 5040) : C(1.0 / 6227020800.0));
  if constexpr (!single) {
    sum = sum * x + C(1.0 / 479001600);
    sum = sum * x + C(1.0 / 39916800);
    sum = sum * x + C(1.0 / 3628800);
    sum = sum * x + C(1.0 / 362880);
    sum = sum * x + C(1.0 / 40320);
    sum = sum * x + C(1.0 / 5040);
  }
  sum = sum * x + C(1.0 / 720);
  sum = sum * x + C(1.0 / 120);
  sum = sum * x + C(1.0 / 24);
  sum = sum * x + C(1.0 / 6);
  sum = sum * x + C(0.5);
  sum = sum * x + C(1);
  return sum * x;
}

// e^x of a small x.
template <class C>
__forceinline__ typename Simd<C>::V exp_small(typename Simd<C>::V x) {
  return expm1_small<C>(x) + C(1);
}

// What e^x is a number of with all its digits.
template <class C>
inline constexpr C kLowestExponent = sizeof(C) == 4 ? C(-87) : C(-708);
template <class C>
inline constexpr C kHighestExponent = sizeof(C) == 4 ? C(88) : C(709);

// e^x to one or two units in the last place, in that range; NaN stays NaN.
template <class C>
__forceinline__ typename Simd<C>::V exp_in_range(typename Simd<C>::V x) {
  using V = typename Simd<C>::V;
  constexpr bool single = sizeof(C) == 4;
  // Adding and subtracting it rounds to an integer, which is left in the low bits.
  constexpr C kRound = single ? C(0x1.8p23) : C(0x1.8p52);
  constexpr C kLn2High = single ? C(0x1.62e4p-1) : C(0x1.62e42feep-1);
  constexpr C kLn2Low = single ? C(0x1.7f7d1cf7p-20) : C(0x1.a39ef35793c76p-33);
  const V shifted = x * C(1.4426950408889634074) + kRound;
  const V n = shifted - kRound;
  const V sum = exp_small<C>((x - n * kLn2High) - n * kLn2Low);  // at most ln(2) / 2 from 0
  using Bits = typename Simd<C>::Mask;
  constexpr int kMantissa = single ? 23 : 52, kExponentBias = single ? 127 : 1023;
  const Bits exponent =
      reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(V{} + kRound) + kExponentBias;
  return sum * reinterpret_cast<V>(exponent << kMantissa);
}

// ... what would overflow or underflow is clamped.
template <class C>
__forceinline__ typename Simd<C>::V exp_lanes(typename Simd<C>::V x) {
  constexpr C lowest = kLowestExponent<C>, highest = kHighestExponent<C>;
  return exp_in_range<C>(x < lowest ? all_lanes<C>(lowest) : x > highest ? all_lanes<C>(highest) : x);
}

}  // namespace
}  // namespace kernelmeta
