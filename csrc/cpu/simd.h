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

template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
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

template <int... I>
struct Indices {};

template <int n, int... I>
struct MakeIndices : MakeIndices<n - 1, n - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Neighbouring lanes added: the sums of a's pairs, then those of b's.
template <class V, int... I>
__forceinline__ V add_pairs(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Lane i of the result is the sum of the lanes of v[i]; v is destroyed. A tree: lanes - 1 additions of
// vectors.
template <class C>
__forceinline__ typename Simd<C>::V sum_each(typename Simd<C>::V* v) {
  using Lanes = typename MakeIndices<kLanes<C>>::type;
#pragma GCC unroll 8
  for (int n = kLanes<C> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1], Lanes{});
  }
  return v[0];
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

// The lanes of a and b by turns: of their low halves or of their high ones.
template <bool high, class V, int... I>
__forceinline__ V interleave(V a, V b, Indices<I...>) {
  constexpr int n = int(sizeof...(I));
  return __builtin_shufflevector(a, b, (I % 2 * n + I / 2 + (high ? n / 2 : 0))...);
}

// to[j][i] = from[i][j], a vector's width both ways: log2(width) rounds in which rows i and i + width / 2
// become, interleaved, rows 2 i and 2 i + 1.
template <class C>
__forceinline__ void transpose_square(const C* from, int64_t ld_from, C* to, int64_t ld_to) {
  constexpr int W = kLanes<C>;
  using Lanes = typename MakeIndices<W>::type;
  typename Simd<C>::V v[W], next[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load(from + i * ld_from);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave<false>(v[i], v[i + W / 2], Lanes{});
      next[2 * i + 1] = interleave<true>(v[i], v[i + W / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * ld_to, v[i]);
}

// Up to it exp_small takes |x|: ln(2) / 2, rounded down.
inline constexpr double kSmallExponent = 0.3465;

// e^x of a small x: the Taylor series, whose next term is below the rounding of 1.
template <class C>
__forceinline__ typename Simd<C>::V exp_small(typename Simd<C>::V x) {
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
  return sum * x + C(1);
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
  using V = typename Simd<C>::V;
  constexpr C lowest = kLowestExponent<C>, highest = kHighestExponent<C>;
  return exp_in_range<C>(x < lowest ? V{} + lowest : x > highest ? V{} + highest : x);
}

}  // namespace
}  // namespace kernelmeta
