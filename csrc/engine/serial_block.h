// The plainest Block there is: one thread, scalars. For what is done once a call, outside of the kernels.
#pragma once

#include "engine/sizes.h"

namespace kernelmeta {

template <class C>
struct SerialBlock {
  using Scalar = C;
  using Sizes = kernelmeta::Sizes;

  const SerialBlock& unfenced() const { return *this; }
  static C inverse_std(C squares, int64_t count, double eps) {
    return C(1 / __builtin_sqrt(double(squares) / double(count) + eps));
  }

  struct At {
    int64_t at;
    C load(const C* p) const { return p[at]; }
    void store(C* p, C value) const { p[at] = value; }
  };

  struct Row {
    int64_t length;

    template <class F>
    void each(F f) const {
      for (int64_t i = 0; i < length; ++i) f(At{i});
    }
    template <class F>
    auto sum(F f) const {
      decltype(f(At{0})) sums[4] = {};  // four chains of additions instead of one long one
      int64_t i = 0;
      for (; i + 4 <= length; i += 4) {
        for (int64_t l = 0; l < 4; ++l) sums[l] += f(At{i + l});
      }
      for (; i < length; ++i) sums[0] += f(At{i});
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    // to[j] = sum over i < n of f(i, j); many columns at a time, in the order of memory.
    template <class F>
    void column_sums(int64_t n, F f, C* to) const {
      constexpr int64_t kColumns = 16;
      int64_t first = 0;
      for (; first + kColumns <= length; first += kColumns) {
        C sums[kColumns] = {};
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t l = 0; l < kColumns; ++l) sums[l] += f(i, At{first + l});
        }
        for (int64_t l = 0; l < kColumns; ++l) to[first + l] = sums[l];
      }
      for (; first < length; ++first) {
        C sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += f(i, At{first});
        to[first] = sum;
      }
    }
    template <class F>
    void one(F f) const {
      f();
    }
  };

  template <class F>
  void feature_entries(int64_t n, int64_t length, F f) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < length; ++j) f(i, At{j});
    }
  }
  template <class F>
  void features(int64_t n, int64_t length, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i, Row{length});
  }
};

}  // namespace kernelmeta
