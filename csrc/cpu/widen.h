// Feature rows as the CPU kernels read them: in the precision of the computation, where they lie or copied.
#pragma once

#include <cstring>

#include "engine/problem.h"

namespace kernelmeta {
namespace {

// Storage types narrower than float, as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__forceinline__ float bit_cast_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__forceinline__ float widen(BFloat16 x) { return bit_cast_float(uint32_t(x.bits) << 16); }

// Exponent and mantissa move up by 13 bits; scaling by 2^112 corrects the exponent's bias and makes
// subnormal halves normal floats. Inf and NaN, whose exponent is all ones, get it all ones again.
__forceinline__ float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast_float(magnitude) * 0x1p112f;
  const float value = magnitude >= 0x0f800000 ? bit_cast_float(magnitude | 0x7f800000) : scaled;
  return x.bits & 0x8000 ? -value : value;
}
__forceinline__ float widen(float x) { return x; }
__forceinline__ double widen(double x) { return x; }

template <class F, class C>
void widen_rows(const Features& f, int64_t task, int64_t D, C* to) {
  const F* data = static_cast<const F*>(f.data);
  for (int64_t i = 0; i < f.rows; ++i) {
    const F* from = data + (f.index ? f.index[task * f.rows + i] * f.row : task * f.task + i * f.row);
    for (int64_t d = 0; d < D; ++d) to[i * D + d] = C(widen(from[d]));
  }
}

template <class C>
bool needs_widening(const Features& f) {
  return f.storage != (sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64);
}

// The rows of one task in the precision of the computation: where they lie, or copied into `buffer`.
template <class C>
FeatureRows<C> widen(const Features& f, int64_t task, int64_t D, C* buffer) {
  if (!needs_widening<C>(f)) {
    const C* data = static_cast<const C*>(f.data);
    if (f.index) return {data, f.row, f.index + task * f.rows};
    return {data + task * f.task, f.row, nullptr};
  }
  switch (f.storage) {
    case Storage::kFloat32:
      widen_rows<float>(f, task, D, buffer);
      break;
    case Storage::kFloat64:
      widen_rows<double>(f, task, D, buffer);
      break;
    case Storage::kBFloat16:
      widen_rows<BFloat16>(f, task, D, buffer);
      break;
    case Storage::kFloat16:
      widen_rows<Float16>(f, task, D, buffer);
      break;
  }
  return {buffer, D, nullptr};
}

template <class C>
C* widened_rows(Arena<C>& arena, const Features& f, int64_t D) {
  return needs_widening<C>(f) ? arena.take(f.rows * D) : nullptr;
}

}  // namespace
}  // namespace kernelmeta
