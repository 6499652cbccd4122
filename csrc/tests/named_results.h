// What a call of kernels gave, and random numbers that both precisions hold.
#pragma once

#include "tests/engine_checks.h"

namespace kernelmeta {
namespace {

// Everything that a call gave, by name.
using Named = std::vector<std::pair<std::string, Vec>>;

// An array of exactly this size, in the precision of the kernels; what is written into it is kept as doubles.
template <class C>
struct Output {
  std::vector<C> values;

  explicit Output(int64_t n) : values(size_t(n), C(NAN)) {}
  C* get() { return values.data(); }
  void keep(Named& all, const char* name) const { all.emplace_back(name, Vec(values.begin(), values.end())); }
};

// [count] of 0..n-1
std::vector<int64_t> draw_numbers(int64_t count, int64_t n) {
  std::uniform_int_distribution<int64_t> uniform(0, n - 1);
  std::vector<int64_t> v(static_cast<size_t>(count));
  for (int64_t& x : v) x = uniform(generator);
  return v;
}

// Rounded to float: both precisions are given the same numbers.
Vec draw_floats(int64_t n, double low = -1, double high = 1) {
  Vec v = draw(n, low, high);
  for (double& x : v) x = double(float(x));
  return v;
}

}  // namespace
}  // namespace kernelmeta
