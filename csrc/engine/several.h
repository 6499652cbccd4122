// Several numbers that are found in one pass over a row.
#pragma once

#include <cstddef>

namespace kernelmeta {

template <class C, size_t n>
struct Several {
  C of[n];
};

}  // namespace kernelmeta
