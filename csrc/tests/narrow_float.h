// Floats of 16 bits, as GPUs have them, for host compilers that have none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kernelmeta {
namespace {

// 1 bit of sign, the exponent, kMantissa bits; 2^kLeast is the smallest normal number. Rounded to the
// nearest, ties to even.
template <int kMantissa, int kLeast>
struct NarrowFloat {
  uint16_t bits;

  NarrowFloat() = default;
  explicit NarrowFloat(float x) : bits(encode(std::fabs(double(x))) | (std::signbit(x) ? 0x8000 : 0)) {}
  explicit operator float() const {
    const int magnitude = bits & 0x7fff, exponent = magnitude >> kMantissa, mantissa = magnitude % kOne;
    double value = std::numeric_limits<double>::infinity();
    if (magnitude > kInfinity)
      value = std::numeric_limits<double>::quiet_NaN();
    else if (magnitude < kInfinity)
      value = exponent == 0 ? std::ldexp(mantissa, kLeast - kMantissa)
                            : std::ldexp(mantissa + kOne, kLeast - kMantissa + exponent - 1);
    return float(bits & 0x8000 ? -value : value);
  }

 private:
  static constexpr int kOne = 1 << kMantissa, kInfinity = (2 - 2 * kLeast + 1) * kOne;

  static uint16_t encode(double x) {
    if (std::isnan(x)) return uint16_t(kInfinity + 1);
    if (x == 0) return 0;
    const int exponent = std::isinf(x) ? 1 - kLeast : std::max(std::ilogb(x), kLeast);
    if (exponent > 1 - kLeast || std::isinf(x)) return uint16_t(kInfinity);
    const double units = std::nearbyint(std::ldexp(x, kMantissa - exponent));
    return uint16_t((exponent - kLeast) * kOne +
                    int(units));  // rounded up to a power of two: the next exponent
  }
};

using BrainFloat = NarrowFloat<7, -126>;
using Half = NarrowFloat<10, -14>;

}  // namespace
}  // namespace kernelmeta
