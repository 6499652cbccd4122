// Arguments of raw ops on tasks that may differ in size (program, ridge), checked and turned into what the
// kernels take; the same for every device. Where tasks on a GPU do differ, their sizes are copied to the
// host, which waits for the device: memory depends on them. Where the caller says how many rows a task has at
// most, offsets and ways on a GPU are left to the kernels, as labels and indices there always are.
#pragma once

#include <array>
#include <set>

#include "arguments.h"
#include "engine/program_task.h"
#include "engine/ridge_task.h"

namespace {

// The values of a tensor of int64, on the host.
std::vector<int64_t> numbers(const Tensor& t) {
  Tensor here =
      t.is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  here = dense(here);
  const auto* values = static_cast<const int64_t*>(here.const_data_ptr());
  return {values, values + here.numel()};
}

// Features [T, rows, D], or, with offsets [T + 1], [all rows, D]; or a bank [n, D] with an index [T, rows] or
// [all rows] into it. `most`: the most rows of a task, or -1; with offsets alone.
struct TaskRowTensor {
  Tensor tensor, index;
  std::vector<int64_t> offsets;  // of every task; if they are unknown, of one that has the most rows
  int64_t D;
  TaskRows rows;

  TaskRowTensor(const Place& on, const Tensor& t, const Optional& row_index, const Optional& task_offsets,
                int64_t most, const char* name)
      : tensor(t), index(row_index ? dense(*row_index) : t) {
    const int64_t own = task_offsets ? 1 : 2;  // dimensions that count rows
    const int64_t wanted = row_index ? 2 : own + 1;
    if (!on.holds(t) || t.dim() != wanted) {
      refuse(std::string(name) + ": expected a " + on.name() + " tensor of " + std::to_string(wanted) +
             " dimensions, got " + shape_text(t));
    }
    D = t.size(-1);
    if (t.stride(-1) != 1 && D > 1) tensor = torch::stable::contiguous(t);
    if (row_index) check_index(on, own, t.size(0), name);
    const Tensor& counted = row_index ? index : t;
    rows_ = task_offsets ? -1 : counted.size(1);
    all_rows_ = counted.size(0) * (task_offsets ? 1 : rows_);
    const int64_t* of_tasks = nullptr;
    if (task_offsets) {
      of_tasks = take_offsets(on, *task_offsets, most, name);
    } else {
      require(most == -1, "max_support and max_query are for tasks with offsets");
      T_ = counted.size(0);
      for (int64_t i = 0; i <= T_; ++i) offsets.push_back(i * rows_);
    }
    const bool even = !task_offsets && !row_index;
    rows = {{tensor.const_data_ptr(), storage(t), std::max<int64_t>(rows_, 0), even ? tensor.stride(0) : 0,
             even ? tensor.stride(1) : tensor.stride(0),
             row_index ? static_cast<const int64_t*>(index.const_data_ptr()) : nullptr,
             row_index ? t.size(0) : 0},
            of_tasks,
            even,
            all_rows_,
            known_ ? -1 : most};
  }
  TaskRowTensor(const TaskRowTensor&) = delete;

  int64_t T() const { return T_; }
  int64_t all_rows() const { return all_rows_; }
  // Whether the offsets were looked at.
  bool known() const { return known_; }
  int64_t count(int64_t t) const { return offsets[size_t(t + 1)] - offsets[size_t(t)]; }
  bool ragged() const { return rows_ < 0; }
  // Of a tensor with so many entries for each row.
  std::vector<int64_t> shape(int64_t entries) const {
    if (ragged()) return {all_rows_, entries};
    return {T(), rows_, entries};
  }

 private:
  int64_t T_, all_rows_;
  int64_t rows_;  // of every task; -1 where they differ
  bool known_ = true;
  Tensor held_offsets_;

  void check_index(const Place& on, int64_t dims, int64_t n, const char* name) const {
    require(
        on.holds(index) && index.dim() == dims && index.scalar_type() == ScalarType::Long,
        "an index must be a tensor of int64 on the bank's device, [T, rows] or, with offsets, [all rows]");
    if (!on.cpu) return;
    const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
    for (int64_t j = 0; j < index.numel(); ++j) {
      if (i[j] < 0 || i[j] >= n) {
        refuse(std::string(name) + ": index " + std::to_string(i[j]) + " is outside of the bank's " +
               std::to_string(n) + " rows");
      }
    }
  }

  // -> the offsets where the kernels read them
  const int64_t* take_offsets(const Place& on, const Tensor& t, int64_t most, const char* name) {
    require(on.holds(t) && t.dim() == 1 && t.numel() >= 1 && t.scalar_type() == ScalarType::Long,
            "offsets must be a tensor [T + 1] of int64 on the features' device");
    require(most >= -1, "max_support and max_query must not be negative");
    T_ = t.numel() - 1;
    held_offsets_ = dense(t);
    known_ = on.cpu || most == -1;
    if (known_) {
      offsets = numbers(t);
      check_offsets(most, name);
    } else {
      offsets = {0, most};
      if (T_ == 0 && all_rows_ > 0) refuse(std::string(name) + ": expected no rows without a task");
    }
    return static_cast<const int64_t*>(held_offsets_.const_data_ptr());
  }

  void check_offsets(int64_t most, const char* name) const {
    bool rising = offsets.front() == 0 && offsets.back() == all_rows_;
    for (int64_t t = 0; t < T_; ++t) rising = rising && count(t) >= 0;
    if (!rising) {
      refuse(std::string(name) + "_offsets: expected numbers that rise from 0 to the number of rows, " +
             std::to_string(all_rows_));
    }
    for (int64_t t = 0; most >= 0 && t < T_; ++t) {
      if (count(t) <= most) continue;
      refuse("max_" + std::string(name) + ": task " + std::to_string(t) + " has " + std::to_string(count(t)) +
             " rows, more than " + std::to_string(most));
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

// The ways of every task and the labels of all support rows, [T, S] or [all rows]; the labels' values are not
// looked at.
struct TaskLabels {
  Tensor labels;
  Optional ways;
  std::vector<int64_t> ways_of;  // each task; if sizes are unknown, of one that has the most ways

  TaskLabels(const Place& on, const Tensor& support_labels, const TaskRowTensor& support,
             const TaskRowTensor& query, const Optional& n_ways, int64_t N)
      : labels(dense(support_labels)), ways_of(support.known() ? size_t(support.T()) : 1, N) {
    const int64_t T = support.T();
    require(T == query.T() && support.D == query.D, "support and query must have the same T and D");
    require(support.known() == query.known(), "max_support and max_query: both or none");
    require(N >= 1 && query.D >= 1, "ways and features: at least one each");
    require(
        on.holds(labels) && labels.scalar_type() == ScalarType::Long && labels.numel() == support.all_rows(),
        "support_labels: expected a tensor of int64 on the features' device, one for each support row");
    if (n_ways) {
      require_shape(on, *n_ways, {T}, "n_ways");
      require(n_ways->scalar_type() == ScalarType::Long, "n_ways must be int64");
      ways = dense(*n_ways);
      if (support.known()) ways_of = numbers(*n_ways);
    }
    if (!support.known()) return;
    for (int64_t t = 0; t < T; ++t) {
      const std::string task = "task " + std::to_string(t);
      const int64_t own = ways_of[size_t(t)], rows = support.count(t);
      if (own < 1 || own > N) {
        refuse("n_ways: " + task + " has " + std::to_string(own) + " ways; expected 1.." + std::to_string(N));
      }
      if (rows < own) {
        refuse("support: " + task + " has " + std::to_string(own) + " ways and " + std::to_string(rows) +
               " support rows; every class needs at least one");
      }
      if (query.count(t) < 1) refuse("query: " + task + " has no row; every task needs one");
    }
  }

  const int64_t* get() const { return static_cast<const int64_t*>(labels.const_data_ptr()); }
  TaskClasses classes() const {
    return {{get(), nullptr, nullptr}, ways ? static_cast<const int64_t*>(ways->const_data_ptr()) : nullptr};
  }
};

// One task of every size (support rows, query rows, ways) that there is, or may be at most.
inline std::vector<int64_t> tasks_of_each_size(const TaskRowTensor& support, const TaskRowTensor& query,
                                               const TaskLabels& labels) {
  std::set<std::array<int64_t, 3>> sizes;
  std::vector<int64_t> tasks;
  for (int64_t t = 0; t < support.T(); ++t) {
    if (sizes.insert({support.count(t), query.count(t), labels.ways_of[size_t(t)]}).second)
      tasks.push_back(t);
    if (!support.ragged() || !support.known()) break;
  }
  return tasks;
}

// [oracle, of query rows, mean, steps] of every phase, one after the other.
inline std::vector<Phase> phases_of(const std::vector<int64_t>& numbers, bool cosine, bool has_mlp) {
  require(numbers.size() % 4 == 0, "phases: expected four numbers a phase");
  std::vector<Phase> phases;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const auto oracle = Oracle(numbers[i]);
    const bool query = numbers[i + 1] != 0;
    require(numbers[i] >= 0 && numbers[i] < kOracles, "phases: unknown oracle");
    require(numbers[i + 3] >= 0, "phases: steps must not be negative");
    require(!query || !needs_labels(oracle), "phases: query rows have no labels");
    require(oracle != Oracle::kSoftAssignment || (cosine && query),
            "phases: soft assignment needs a cosine classifier and query rows");
    require(oracle != Oracle::kSyntheticGradient || has_mlp, "phases: a synthetic gradient needs its MLP");
    if (numbers[i + 3] > 0) phases.push_back({oracle, query, numbers[i + 2] != 0, numbers[i + 3]});
  }
  return phases;
}

using MlpOptionals = std::array<const Optional*, 10>;

// Arguments that program and its backward share.
template <class C>
struct ProgramArguments {
  Place on;
  TaskRowTensor support, query;
  TaskLabels labels;
  std::vector<Phase> phases;
  std::optional<Parameter<C>> theta0, weight, scale, bias, target, rates;
  std::optional<MlpParameters<C>> mlp;
  ProgramProblem<C> problem;

  ProgramArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& support_rows,
                   const Optional& support_index, const Tensor& support_labels,
                   const Optional& support_offsets, const Optional& query_offsets, const Optional& n_ways,
                   int64_t max_support, int64_t max_query, const Optional& theta0_tensor,
                   const Optional& weight_tensor, const Optional& scale_tensor, const Optional& bias_tensor,
                   const Optional& target_tensor, const Tensor& rates_tensor, const MlpOptionals& m,
                   const Optional& running, int64_t n_way, const std::vector<int64_t>& phase_numbers,
                   bool cosine, int64_t start, bool first_order, bool coefficients)
      : on(query_rows),
        support(on, support_rows, support_index, support_offsets, max_support, "support"),
        query(on, query_rows, query_index, query_offsets, max_query, "query"),
        labels(on, support_labels, support, query, n_ways, n_way) {
    const int64_t D = query.D, N = n_way;
    require(start >= 0 && start <= 2, "start must be 0, 1 or 2");
    require(!cosine || start != 2, "a cosine classifier cannot start at zero");
    require(!first_order || !cosine, "first_order is for linear classifiers");
    require_storage<C>(support, query);
    problem = {};
    problem.start = Start(start);
    if (start == 1) {
      require(theta0_tensor.has_value(), "a learned start needs theta0");
      problem.theta0 = hold(theta0, theta0_tensor, {N, D}, "theta0");
    }
    if (start == 0) problem.weight = hold(weight, weight_tensor, {D}, "weight");
    if (cosine) {
      problem.scale = hold_value(scale, scale_tensor, "scale");
      problem.bias = hold_value(bias, bias_tensor, "bias");
    } else {
      problem.start_bias = hold(bias, bias_tensor, {N}, "bias");
    }
    problem.target = hold_value(target, target_tensor, "target_scale");
    if (*m[0]) {
      for (const Optional* tensor : m) require(tensor->has_value(), "mlp: all ten tensors or none");
      problem.H = (*m[0])->size(0);
      require(problem.H >= 1, "hidden units: at least one");
      mlp.emplace(on,
                  MlpTensors{**m[0], **m[1], **m[2], **m[3], **m[4], **m[5], **m[6], **m[7], **m[8], **m[9]},
                  running, N, problem.H);
    }
    phases = phases_of(phase_numbers, cosine, mlp.has_value());
    for (const Phase& phase : phases) problem.K += phase.steps;
    problem.rates = hold(rates, rates_tensor, {problem.K}, "rates");

    problem.T = query.T();
    problem.N = N;
    problem.D = D;
    problem.n_phases = int64_t(phases.size());
    problem.cosine = cosine;
    problem.coefficients = coefficients;
    problem.first_order = first_order;
    problem.support = support.rows;
    problem.query = query.rows;
    problem.classes = labels.classes();
  }
  ProgramArguments(const ProgramArguments&) = delete;

  // The problem as the host can look at it, sizes of tasks and all.
  ProgramProblem<C> on_host() const {
    ProgramProblem<C> p = problem;
    p.support.offsets = support.offsets.data();
    p.query.offsets = query.offsets.data();
    p.classes.ways = labels.ways_of.data();
    p.scale = p.bias = p.target = nullptr;
    return p;
  }
  // One task of every size that there is.
  std::vector<int64_t> tasks_of_each_size() const { return ::tasks_of_each_size(support, query, labels); }
  // The MLP's sizes.
  Sizes sizes() const { return {1, 1, 1, problem.H ? problem.N : 0, problem.D, problem.H, problem.K}; }

 private:
  const C* hold(std::optional<Parameter<C>>& held, const Optional& t, const std::vector<int64_t>& shape,
                const char* name) {
    if (!t) return nullptr;
    held.emplace(on, *t, shape, name);
    return *held;
  }
  const C* hold_value(std::optional<Parameter<C>>& held, const Optional& t, const char* name) {
    if (!t) return nullptr;
    require(t->numel() == 1, "scale, target_scale and a cosine classifier's bias: expected one value");
    held.emplace(on, *t, name);
    return *held;
  }
};

// What program_backward takes beside them, and where its results go.
template <class C>
struct ProgramBackwardArguments {
  Parameter<C> grad_logits, trace;
  std::optional<Parameter<C>> of_support, of_query, of_start;
  Tensor grad_query, grad_support;
  ProgramBackward<C> run;

  ProgramBackwardArguments(const ProgramArguments<C>& a, const Tensor& gz, const Optional& gs,
                           const Optional& gq, const Optional& g0, const Tensor& saved, int64_t trace_size,
                           bool need_query, bool need_support)
      : grad_logits(a.on, gz, a.query.shape(a.problem.N), "grad_logits"),
        trace(a.on, saved, {trace_size}, "trace"),
        grad_query(empty(need_query ? a.query.shape(a.problem.D) : std::vector<int64_t>{0}, kType<C>, a.on)),
        grad_support(
            empty(need_support ? a.support.shape(a.problem.D) : std::vector<int64_t>{0}, kType<C>, a.on)) {
    const ProgramProblem<C>& p = a.problem;
    if (g0) {
      require(p.coefficients && gs && gq, "gradients of coefficients: all three or none");
      of_support.emplace(a.on, *gs, a.support.shape(p.N), "grad_support_coefficients");
      of_query.emplace(a.on, *gq, a.query.shape(p.N), "grad_query_coefficients");
      of_start.emplace(a.on, *g0, std::vector{p.T, p.N}, "grad_start_coefficients");
    }
    run = {p,
           trace,
           grad_logits,
           g0 ? of_support->get() : nullptr,
           g0 ? of_query->get() : nullptr,
           g0 ? of_start->get() : nullptr,
           need_support ? data<C>(grad_support) : nullptr,
           need_query ? data<C>(grad_query) : nullptr};
  }
};

// Arguments that ridge and its backward share.
template <class C>
struct RidgeArguments {
  Place on;
  TaskRowTensor support, query;
  TaskLabels labels;
  RidgeProblem<C> problem;

  RidgeArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& support_rows,
                 const Optional& support_index, const Tensor& support_labels, const Optional& support_offsets,
                 const Optional& query_offsets, const Optional& n_ways, int64_t max_support,
                 int64_t max_query, const Tensor& lambda, const Tensor& scale, const Tensor& bias,
                 int64_t n_way)
      : on(query_rows),
        support(on, support_rows, support_index, support_offsets, max_support, "support"),
        query(on, query_rows, query_index, query_offsets, max_query, "query"),
        labels(on, support_labels, support, query, n_ways, n_way) {
    require_storage<C>(support, query);
    const char* complaint = "regularization, scale and bias must be one value each, of one dtype";
    problem = {query.T(),
               n_way,
               query.D,
               support.rows,
               query.rows,
               labels.classes(),
               one_value<C>(on, lambda, complaint),
               one_value<C>(on, scale, complaint),
               one_value<C>(on, bias, complaint)};
  }
  RidgeArguments(const RidgeArguments&) = delete;

  // The problem as the host can look at it, sizes of tasks and all.
  RidgeProblem<C> on_host() const {
    static const C one = C(1);
    RidgeProblem<C> p = problem;
    p.support.offsets = support.offsets.data();
    p.query.offsets = query.offsets.data();
    p.classes.ways = labels.ways_of.data();
    p.lambda = p.scale = p.bias = &one;
    return p;
  }
  // One task of every size that there is.
  std::vector<int64_t> tasks_of_each_size() const { return ::tasks_of_each_size(support, query, labels); }
};

// What ridge_backward takes beside them, and its results.
template <class C>
struct RidgeBackwardArguments {
  Parameter<C> grad_logits, trace;
  std::optional<Parameter<C>> grad_coefficients;
  Tensor grad_query, grad_support, grad_lambda, grad_scale, grad_bias;
  RidgeBackward<C> run;

  RidgeBackwardArguments(const RidgeArguments<C>& a, const Tensor& gz, const Optional& gc,
                         const Tensor& saved, int64_t trace_size, const Tensor& lambda, const Tensor& scale,
                         const Tensor& bias, bool need_query, bool need_support)
      : grad_logits(a.on, gz, a.query.shape(a.problem.N), "grad_logits"),
        trace(a.on, saved, {trace_size}, "trace"),
        grad_query(empty(need_query ? a.query.shape(a.problem.D) : std::vector<int64_t>{0}, kType<C>, a.on)),
        grad_support(
            empty(need_support ? a.support.shape(a.problem.D) : std::vector<int64_t>{0}, kType<C>, a.on)),
        grad_lambda(empty(::sizes(lambda), kType<C>, a.on)),
        grad_scale(empty(::sizes(scale), kType<C>, a.on)),
        grad_bias(empty(::sizes(bias), kType<C>, a.on)) {
    if (gc) grad_coefficients.emplace(a.on, *gc, a.support.shape(a.problem.N), "grad_coefficients");
    run = {a.problem,
           trace,
           grad_logits,
           gc ? grad_coefficients->get() : nullptr,
           need_support ? data<C>(grad_support) : nullptr,
           need_query ? data<C>(grad_query) : nullptr};
  }

  auto results() const { return std::tuple{grad_query, grad_support, grad_lambda, grad_scale, grad_bias}; }
};

}  // namespace
