// Labels of tasks that may differ in size, checked and turned into what the CPU kernels take.
#pragma once

#include "task_arguments.h"

namespace {

// Lists of members of every class.
class RaggedClassLists {
 public:
  RaggedClassLists(const TaskLabels& labels, const TaskRowTensor& support, int64_t N)
      : members_(size_t(support.offsets.back())), offsets_(size_t(support.T() * (N + 1))) {
    for (int64_t t = 0; t < support.T(); ++t) {
      const int64_t first = support.offsets[size_t(t)];
      sort_task(t, N, labels.ways_of[size_t(t)], labels.get() + first, support.count(t),
                members_.data() + first);
    }
  }
  TaskClasses with(const TaskClasses& classes) const {
    return {{nullptr, members_.data(), offsets_.data()}, classes.ways};
  }

 private:
  std::vector<int32_t> members_, offsets_;

  void sort_task(int64_t t, int64_t N, int64_t ways, const int64_t* labels, int64_t rows, int32_t* members) {
    const std::string task = "task " + std::to_string(t);
    int32_t* offset = offsets_.data() + t * (N + 1);
    for (int64_t i = 0; i < rows; ++i) {
      if (labels[i] < 0 || labels[i] >= ways) {
        refuse("support_labels: " + task + " has label " + std::to_string(labels[i]) +
               "; labels must be in 0.." + std::to_string(ways - 1));
      }
      ++offset[labels[i] + 1];
    }
    for (int64_t n = 0; n < ways; ++n) {
      if (offset[n + 1] == 0) {
        refuse("support_labels: " + task + " has no row of class " + std::to_string(n) +
               "; every class needs at least one support row");
      }
      offset[n + 1] += offset[n];
    }
    std::vector<int32_t> next(offset, offset + ways);
    for (int64_t i = 0; i < rows; ++i) members[next[size_t(labels[i])]++] = int32_t(i);
  }
};

}  // namespace
