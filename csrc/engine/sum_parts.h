// Where the parts of a sum over tasks go.
#pragma once

#include "engine/portability.h"

namespace kernelmeta {

// Parts of an array, and where each is to go; what lies in none of them goes nowhere.
template <class C>
struct SumParts {
  static constexpr int kMost = 8;
  struct Part {
    int64_t offset, size;
    C* to;
  };
  Part parts[kMost];
  int count = 0;

  SumParts() = default;
  SumParts(C* to, int64_t size) { add(0, size, to); }
  void add(int64_t offset, int64_t size, C* to) { parts[count++] = {offset, size, to}; }
  KERNELMETA_INLINE void store(int64_t at, C value) const {
    for (int i = 0; i < count; ++i) {
      const int64_t of_part = at - parts[i].offset;
      if (of_part >= 0 && of_part < parts[i].size) parts[i].to[of_part] = value;
    }
  }
};

}  // namespace kernelmeta
