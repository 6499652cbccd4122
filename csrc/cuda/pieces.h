// Where the parts of a sum over blocks go.
#pragma once

#include "engine/portability.h"

namespace kernelmeta {

// Parts of an array, and where each is to go; what lies in none of them goes nowhere.
template <class C>
struct Pieces {
  static constexpr int kMost = 8;
  struct Piece {
    int64_t offset, size;
    C* to;
  };
  Piece pieces[kMost];
  int count = 0;

  Pieces() = default;
  Pieces(C* to, int64_t size) { add(0, size, to); }
  void add(int64_t offset, int64_t size, C* to) { pieces[count++] = {offset, size, to}; }
  __host__ __device__ __forceinline__ void store(int64_t at, C value) const {
    for (int i = 0; i < count; ++i) {
      const int64_t of_piece = at - pieces[i].offset;
      if (of_piece >= 0 && of_piece < pieces[i].size) pieces[i].to[of_piece] = value;
    }
  }
};

}  // namespace kernelmeta
