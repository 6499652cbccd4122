// Rows and labels of tasks that may differ in size, checked and turned into what the kernels take.
#pragma once

#include "arguments.h"
#include "cpu/program_table.h"

namespace {

// Features [T, rows, D], or, with offsets [T + 1], [all rows, D]; or a bank [n, D] with an index [T, rows] or
// [all rows] into it.
struct TaskRowTensor {
  Tensor tensor, index;
  std::vector<int64_t> offsets;
  int64_t D;
  TaskRows rows;

  TaskRowTensor(const Tensor& t, const std::optional<Tensor>& row_index,
                const std::optional<Tensor>& task_offsets, const char* name)
      : tensor(t), index(row_index ? dense(*row_index) : t) {
    const int64_t own = task_offsets ? 1 : 2;  // dimensions that count rows
    const int64_t wanted = row_index ? 2 : own + 1;
    if (!t.is_cpu() || t.dim() != wanted) {
      refuse(std::string(name) + ": expected a CPU tensor of " + std::to_string(wanted) +
             " dimensions, got " + shape_text(t));
    }
    D = t.size(-1);
    if (t.stride(-1) != 1 && D > 1) tensor = torch::stable::contiguous(t);
    if (row_index) check_index(own, t.size(0), name);
    const Tensor& counted = row_index ? index : t;
    if (task_offsets) {
      take_offsets(*task_offsets, counted.size(0), name);
    } else {
      for (int64_t i = 0; i <= counted.size(0); ++i) offsets.push_back(i * counted.size(1));
    }
    rows.offsets = offsets.data();
    rows.even = !task_offsets && !row_index;
    rows.features = {tensor.const_data_ptr(),
                     storage(t),
                     0,
                     rows.even ? tensor.stride(0) : 0,
                     rows.even ? tensor.stride(1) : tensor.stride(0),
                     row_index ? static_cast<const int64_t*>(index.const_data_ptr()) : nullptr,
                     row_index ? t.size(0) : 0};
    rows_ = task_offsets ? -1 : counted.size(1);
  }
  TaskRowTensor(const TaskRowTensor&) = delete;

  int64_t T() const { return int64_t(offsets.size()) - 1; }
  // Of a tensor with so many entries for each row.
  std::vector<int64_t> shape(int64_t entries) const {
    if (rows_ < 0) return {offsets.back(), entries};
    return {T(), rows_, entries};
  }

 private:
  int64_t rows_;  // of every task; -1 where they differ

  void check_index(int64_t dims, int64_t n, const char* name) const {
    require(index.is_cpu() && index.dim() == dims && index.scalar_type() == ScalarType::Long,
            "an index must be a CPU tensor of int64, [T, rows] or, with offsets, [all rows]");
    const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
    for (int64_t j = 0; j < index.numel(); ++j) {
      if (i[j] < 0 || i[j] >= n) {
        refuse(std::string(name) + ": index " + std::to_string(i[j]) + " is outside of the bank's " +
               std::to_string(n) + " rows");
      }
    }
  }

  void take_offsets(const Tensor& t, int64_t all_rows, const char* name) {
    require(t.is_cpu() && t.dim() == 1 && t.numel() >= 1 && t.scalar_type() == ScalarType::Long,
            "offsets must be a CPU tensor [T + 1] of int64");
    const Tensor held = dense(t);
    const auto* o = static_cast<const int64_t*>(held.const_data_ptr());
    offsets.assign(o, o + held.numel());
    bool rising = offsets.front() == 0 && offsets.back() == all_rows;
    for (size_t i = 1; i < offsets.size(); ++i) rising = rising && offsets[i - 1] <= offsets[i];
    if (!rising) {
      refuse(std::string(name) + "_offsets: expected numbers that rise from 0 to the number of rows, " +
             std::to_string(all_rows));
    }
  }
};

// float64 features go with float64 parameters, anything narrower with float32.
template <class C>
void require_storage(const TaskRowTensor& support, const TaskRowTensor& query) {
  for (const TaskRowTensor* f : {&query, &support}) {
    require((f->rows.features.storage == Storage::kFloat64) == (sizeof(C) == 8),
            "float64 features need float64 parameters, and float64 parameters float64 features");
  }
}

// Support labels [T, S] or [all rows], and the ways of every task, checked, as lists of members of every
// class.
class RaggedClassLists {
 public:
  RaggedClassLists(const Tensor& labels, const TaskRowTensor& support, const std::optional<Tensor>& n_ways,
                   int64_t N)
      : ways_(size_t(support.T()), N),
        members_(size_t(support.offsets.back())),
        offsets_(size_t(support.T() * (N + 1))) {
    const int64_t T = support.T();
    require(labels.is_cpu() && labels.scalar_type() == ScalarType::Long &&
                labels.numel() == support.offsets.back(),
            "support_labels: expected a CPU tensor of int64, one for each support row");
    if (n_ways) {
      require_shape(*n_ways, {T}, "n_ways");
      require(n_ways->scalar_type() == ScalarType::Long, "n_ways must be int64");
      const Tensor held = dense(*n_ways);
      const auto* w = static_cast<const int64_t*>(held.const_data_ptr());
      ways_.assign(w, w + T);
    }
    const Tensor held = dense(labels);
    const auto* all = static_cast<const int64_t*>(held.const_data_ptr());
    for (int64_t t = 0; t < T; ++t) {
      const int64_t first = support.offsets[size_t(t)], rows = support.offsets[size_t(t + 1)] - first;
      sort_task(t, N, all + first, rows, members_.data() + first);
    }
  }
  const int64_t* ways() const { return ways_.data(); }
  const int32_t* members() const { return members_.data(); }
  const int32_t* offsets() const { return offsets_.data(); }

 private:
  std::vector<int64_t> ways_;
  std::vector<int32_t> members_, offsets_;

  void sort_task(int64_t t, int64_t N, const int64_t* labels, int64_t rows, int32_t* members) {
    const std::string task = "task " + std::to_string(t);
    const int64_t ways = ways_[size_t(t)];
    if (ways < 1 || ways > N) {
      refuse("n_ways: " + task + " has " + std::to_string(ways) + " ways; expected 1.." + std::to_string(N));
    }
    if (rows < ways) {
      refuse("support: " + task + " has " + std::to_string(ways) + " ways and " + std::to_string(rows) +
             " support rows; every class needs at least one");
    }
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
