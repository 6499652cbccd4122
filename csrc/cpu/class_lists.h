// Labels, checked, as lists of members of every class.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "engine/problem.h"

namespace kernelmeta {

// Raises std::invalid_argument for a label outside of 0..N-1 and for a class without a row.
class ClassLists {
 public:
  ClassLists(const int64_t* label, int64_t T, int64_t S, int64_t N) : members_(T * S), offsets_(T * (N + 1)) {
    for (int64_t t = 0; t < T; ++t, label += S) {
      int32_t* offset = offsets_.data() + t * (N + 1);
      for (int64_t i = 0; i < S; ++i) {
        if (label[i] < 0 || label[i] >= N) {
          throw std::invalid_argument("support_labels: task " + std::to_string(t) + " has label " +
                                      std::to_string(label[i]) + "; labels must be in 0.." +
                                      std::to_string(N - 1));
        }
        ++offset[label[i] + 1];
      }
      for (int64_t n = 0; n < N; ++n) {
        if (offset[n + 1] == 0) {
          throw std::invalid_argument("support_labels: task " + std::to_string(t) + " has no row of class " +
                                      std::to_string(n) + "; every class needs at least one support row");
        }
        offset[n + 1] += offset[n];
      }
      std::vector<int32_t> next(offset, offset + N);
      for (int64_t i = 0; i < S; ++i) members_[t * S + next[label[i]]++] = int32_t(i);
    }
  }
  ClassTable table() const { return {nullptr, members_.data(), offsets_.data()}; }

 private:
  std::vector<int32_t> members_, offsets_;
};

}  // namespace kernelmeta
