// Features and labels of tasks, which may differ in size. Where tasks on a GPU do differ, their sizes are
// copied to the host, which waits for the device: memory depends on them. Where the caller says how many rows
// a task has at most, offsets and ways on a GPU are left to the kernels, as labels and indices there always
// are.
#pragma once

#include <array>
#include <set>

#include "engine/task_rows.h"
#include "ops/tensors.h"

namespace kernelmeta {

// The values of a tensor of int64, on the host.
inline std::vector<int64_t> on_host(const Tensor& t) {
  const Tensor here =
      dense(t.is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  return {integers(here), integers(here) + here.numel()};
}

// What an op on tasks of equal size is called with before its parameters.
struct RowTensors {
  Reader& in;
  Tensor support = in.take<Tensor>("support");
  OptionalTensor support_index = in.take<OptionalTensor>("support_index");
  Tensor query = in.take<Tensor>("query");
  OptionalTensor query_index = in.take<OptionalTensor>("query_index");
  Tensor support_labels = in.take<Tensor>("support_labels");
};

// The same for tasks that may differ in size.
struct RaggedRowTensors : RowTensors {
  OptionalTensor support_offsets = in.take<OptionalTensor>("support_offsets");
  OptionalTensor query_offsets = in.take<OptionalTensor>("query_offsets");
  OptionalTensor n_ways = in.take<OptionalTensor>("n_ways");
};

// Features [T, rows, D], or, with offsets [T + 1], [all rows, D]; or a bank [n, D] with an index [T, rows] or
// [all rows] into it. Rows must be contiguous, nothing else need be.
class TaskFeatures {
 public:
  // most: the most rows of a task, or -1; with offsets alone.
  TaskFeatures(const TensorDevice& on, const Tensor& t, const OptionalTensor& index, const char* name,
               const OptionalTensor& offsets = std::nullopt, int64_t most = -1)
      : name_(name), tensor_(t), index_(index) {
    const int64_t own = offsets ? 1 : 2;  // dimensions that count rows
    if (!on.holds(t) || t.dim() != (index ? 2 : own + 1)) {
      refuse(std::string(name) + ": expected a " + on.name() + " tensor " +
             (index     ? "[n, D]"
              : offsets ? "[all rows, D]"
                        : "[T, rows, D]") +
             ", got " + shape_text(shape_of(t)));
    }
    if (t.size(-1) < 1) refuse(std::string(name) + ": at least one feature");
    if (t.stride(-1) != 1 && D() > 1) tensor_ = torch::stable::contiguous(t);
    if (index) check_index(on, own);
    const Tensor& counted = index ? *index_ : t;
    T_ = offsets ? 0 : counted.size(0);
    rows_ = offsets ? -1 : counted.size(1);
    all_rows_ = offsets ? counted.size(0) : T_ * rows_;
    if (offsets)
      take_offsets(on, *offsets, most);
    else
      require(most == -1, "max_support and max_query are for tasks with offsets");
  }
  TaskFeatures(const TaskFeatures&) = delete;

  int64_t T() const { return T_; }
  int64_t D() const { return tensor_.size(-1); }
  // Of every task, where all have as many.
  int64_t rows() const { return rows_; }
  int64_t all_rows() const { return all_rows_; }
  bool ragged() const { return rows_ < 0; }
  // Whether every task's size is known here.
  bool known() const { return known_; }
  // Of one task; if sizes are unknown, of one that has the most rows.
  int64_t first(int64_t t) const { return ragged() ? offsets_[size_t(t)] : t * rows_; }
  int64_t count(int64_t t) const { return first(t + 1) - first(t); }
  // Of a tensor with so many entries for each row.
  Shape shape(int64_t entries) const {
    return ragged() ? Shape{all_rows_, entries} : Shape{T_, rows_, entries};
  }

  Storage storage() const { return kernelmeta::storage(tensor_); }
  // As the kernels read them.
  TaskRows task_rows() const {
    const bool even = !ragged() && !index_;
    const Features features{tensor_.const_data_ptr(),
                            storage(),
                            std::max<int64_t>(rows_, 0),
                            even ? tensor_.stride(0) : 0,
                            even ? tensor_.stride(1) : tensor_.stride(0),
                            index_ ? integers(*index_) : nullptr,
                            index_ ? tensor_.size(0) : 0};
    return {features, held_offsets_ ? integers(*held_offsets_) : nullptr, even, all_rows_,
            known_ ? -1 : most_};
  }
  // As the host can look at them.
  TaskRows task_rows_on_host() const {
    TaskRows rows = task_rows();
    rows.offsets = ragged() ? offsets_.data() : nullptr;
    return rows;
  }
  Features features() const { return task_rows().features; }

 private:
  const char* name_;
  Tensor tensor_;
  OptionalTensor index_, held_offsets_;
  std::vector<int64_t> offsets_;
  int64_t T_, rows_, all_rows_, most_ = -1;
  bool known_ = true;

  void check_index(const TensorDevice& on, int64_t dims) {
    require(
        on.holds(*index_) && index_->dim() == dims && index_->scalar_type() == ScalarType::Long,
        "an index must be a tensor of int64 on the bank's device, [T, rows] or, with offsets, [all rows]");
    index_ = dense(*index_);
    if (!on.cpu) return;
    const int64_t n = tensor_.size(0), *i = integers(*index_);
    for (int64_t j = 0; j < index_->numel(); ++j) {
      if (i[j] >= 0 && i[j] < n) continue;
      refuse(std::string(name_) + ": index " + std::to_string(i[j]) + " is outside of the bank's " +
             std::to_string(n) + " rows");
    }
  }

  void take_offsets(const TensorDevice& on, const Tensor& t, int64_t most) {
    require(on.holds(t) && t.dim() == 1 && t.numel() >= 1 && t.scalar_type() == ScalarType::Long,
            "offsets must be a tensor [T + 1] of int64 on the features' device");
    require(most >= -1, "max_support and max_query must not be negative");
    T_ = t.numel() - 1;
    most_ = most;
    held_offsets_ = dense(t);
    known_ = on.cpu || most == -1;
    if (known_) {
      offsets_ = on_host(t);
      check_offsets();
    } else {
      offsets_ = {0, most};
      if (T_ == 0 && all_rows_ > 0) refuse(std::string(name_) + ": expected no rows without a task");
    }
  }

  void check_offsets() const {
    bool rising = offsets_.front() == 0 && offsets_.back() == all_rows_;
    for (int64_t t = 0; t < T_; ++t) rising = rising && offsets_[size_t(t)] <= offsets_[size_t(t + 1)];
    if (!rising) {
      refuse(std::string(name_) + "_offsets: expected numbers that rise from 0 to the number of rows, " +
             std::to_string(all_rows_));
    }
    for (int64_t t = 0; most_ >= 0 && t < T_; ++t) {
      if (count(t) <= most_) continue;
      refuse("max_" + std::string(name_) + ": task " + std::to_string(t) + " has " +
             std::to_string(count(t)) + " rows, more than " + std::to_string(most_));
    }
  }
};

// float64 features go with float64 parameters, anything narrower with float32.
template <class C>
void require_storage(std::initializer_list<const TaskFeatures*> all) {
  for (const TaskFeatures* f : all) {
    require((f->storage() == Storage::kFloat64) == (sizeof(C) == 8),
            "float64 features need float64 parameters, and float64 parameters float64 features");
  }
}

// Sizes of tasks that all have as many rows.
inline Sizes even_sizes(const TaskFeatures& support, const TaskFeatures& query, int64_t N, int64_t H,
                        int64_t K) {
  require(support.T() == query.T() && support.D() == query.D(),
          "support and query must have the same T and D");
  require(K >= 0, "steps must not be negative");
  require(N >= 1 && query.rows() >= 1, "ways and query rows: at least one each");
  return {query.T(), support.rows(), query.rows(), N, query.D(), H, K};
}

// The ways of every task and the labels of all support rows, [T, S] or [all rows]; the labels' values are not
// looked at.
class TaskLabels {
 public:
  TaskLabels(const TensorDevice& on, const Tensor& support_labels, const TaskFeatures& support,
             const TaskFeatures& query, const OptionalTensor& n_ways, int64_t N, bool every_class)
      : N_(N), every_class_(every_class), labels_(dense(support_labels)) {
    const int64_t T = support.T();
    require(T == query.T() && support.D() == query.D(), "support and query must have the same T and D");
    require(support.known() == query.known(), "max_support and max_query: both or none");
    require(N >= 1, "ways: at least one");
    require(on.holds(labels_) && labels_.scalar_type() == ScalarType::Long &&
                labels_.numel() == support.all_rows(),
            "support_labels: expected a tensor of int64 on the features' device, one for each support row");
    if (n_ways) {
      require_shape(on, *n_ways, {T}, "n_ways");
      require(n_ways->scalar_type() == ScalarType::Long, "n_ways must be int64");
      held_ways_ = dense(*n_ways);
      if (support.known()) ways_ = on_host(*n_ways);
    }
    if (!support.known()) return;
    for (int64_t t = 0; t < T; ++t) {
      const std::string task = "task " + std::to_string(t);
      const int64_t own = ways(t), rows = support.count(t);
      if (own < 1 || own > N) {
        refuse("n_ways: " + task + " has " + std::to_string(own) + " ways; expected 1.." + std::to_string(N));
      }
      if (every_class && rows < own) {
        refuse("support: " + task + " has " + std::to_string(own) + " ways and " + std::to_string(rows) +
               " support rows; every class needs at least one");
      }
      if (query.count(t) < 1) refuse("query: " + task + " has no row; every task needs one");
    }
  }

  const int64_t* get() const { return integers(labels_); }
  int64_t ways(int64_t t) const { return ways_.empty() ? N_ : ways_[size_t(t)]; }
  // Whether every class of a task needs a support row.
  bool every_class() const { return every_class_; }
  // As the kernels read them.
  TaskClasses classes() const {
    return {{get(), nullptr, nullptr}, held_ways_ ? integers(*held_ways_) : nullptr};
  }
  // As the host can look at them.
  TaskClasses classes_on_host() const {
    return {{get(), nullptr, nullptr}, ways_.empty() ? nullptr : ways_.data()};
  }

 private:
  int64_t N_;
  bool every_class_;
  Tensor labels_;
  OptionalTensor held_ways_;
  std::vector<int64_t> ways_;
};

// What is checked alike of all calls with tasks that may differ in size. max_support, max_query: -1 where the
// caller does not say.
struct RaggedArguments {
  TensorDevice on;
  TaskFeatures support, query;
  TaskLabels labels;

  RaggedArguments(const RaggedRowTensors& rows, int64_t n_way, int64_t max_support, int64_t max_query,
                  bool every_class = true)
      : on(rows.query),
        support(on, rows.support, rows.support_index, "support", rows.support_offsets, max_support),
        query(on, rows.query, rows.query_index, "query", rows.query_offsets, max_query),
        labels(on, rows.support_labels, support, query, rows.n_ways, n_way, every_class) {}

  // A problem's tasks as the host can look at them.
  template <class Problem>
  void put_tasks_on_host(Problem& p) const {
    p.support = support.task_rows_on_host();
    p.query = query.task_rows_on_host();
    p.classes = labels.classes_on_host();
  }
};

// One task of every size (support rows, query rows, ways) that there is, or may be at most.
inline std::vector<int64_t> tasks_of_each_size(const TaskFeatures& support, const TaskFeatures& query,
                                               const TaskLabels& labels) {
  std::set<std::array<int64_t, 3>> sizes;
  std::vector<int64_t> tasks;
  for (int64_t t = 0; t < support.T(); ++t) {
    if (sizes.insert({support.count(t), query.count(t), labels.ways(t)}).second) tasks.push_back(t);
    if (!support.ragged() || !support.known()) break;
  }
  return tasks;
}

}  // namespace kernelmeta
