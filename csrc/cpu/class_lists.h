// Labels, checked, as lists of members of every class.
#pragma once

#include "ops/tasks.h"

namespace kernelmeta::cpu {

// Raises std::invalid_argument for a label that names none of a task's classes and for a class without a row,
// where every class needs one.
class ClassLists {
 public:
  // Of tasks of S rows and N ways each.
  ClassLists(const int64_t* labels, int64_t T, int64_t S, int64_t N) {
    if (T > 0 && N > S) {
      refuse("support_labels: " + std::to_string(N) + " classes and " + std::to_string(S) +
             " support rows a task; every class needs at least one support row");
    }
    members_.resize(size_t(T * S));
    offsets_.resize(size_t(T * (N + 1)));
    for (int64_t t = 0; t < T; ++t) sort(t, N, N, labels, t * S, S, true);
  }
  // Of tasks that may differ; N: the most ways.
  ClassLists(const TaskLabels& labels, const TaskFeatures& support, int64_t N)
      : members_(size_t(support.all_rows())), offsets_(size_t(support.T() * (N + 1))) {
    for (int64_t t = 0; t < support.T(); ++t) {
      sort(t, N, labels.ways(t), labels.get(), support.first(t), support.count(t), labels.every_class());
    }
  }
  ClassTable table() const { return {nullptr, members_.data(), offsets_.data()}; }

 private:
  std::vector<int32_t> members_, offsets_;

  void sort(int64_t t, int64_t most_ways, int64_t ways, const int64_t* labels, int64_t first, int64_t rows,
            bool every_class) {
    const std::string task = "support_labels: task " + std::to_string(t);
    int32_t* offset = offsets_.data() + t * (most_ways + 1);
    labels += first;
    for (int64_t i = 0; i < rows; ++i) {
      if (labels[i] < 0 || labels[i] >= ways) {
        refuse(task + " has label " + std::to_string(labels[i]) + "; labels must be in 0.." +
               std::to_string(ways - 1));
      }
      ++offset[labels[i] + 1];
    }
    for (int64_t n = 0; n < ways; ++n) {
      if (every_class && offset[n + 1] == 0) {
        refuse(task + " has no row of class " + std::to_string(n) +
               "; every class needs at least one support row");
      }
      offset[n + 1] += offset[n];
    }
    std::vector<int32_t> next(offset, offset + ways);
    for (int64_t i = 0; i < rows; ++i) members_[size_t(first + next[size_t(labels[i])]++)] = int32_t(i);
  }
};

}  // namespace kernelmeta::cpu
