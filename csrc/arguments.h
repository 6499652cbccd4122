// Tensors of a raw op, checked and turned into what the kernels take; the same for every device.
//
// Callers in kernelmeta/ops have checked arguments with better messages; the checks here are what keeps a
// direct call of a raw op from reading memory it should not. Errors are std::invalid_argument, which Python
// sees as ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/linear_head_task.h"
#include "engine/problem.h"

namespace {

using namespace kernelmeta;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// The device that all tensors of a call must be on.
struct Place {
  bool cpu = true;
  int32_t index = 0;

  Place() = default;  // a CPU
  explicit Place(const Tensor& t) : cpu(t.is_cpu()), index(cpu ? 0 : t.get_device_index()) {}
  bool holds(const Tensor& t) const {
    return cpu ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index;
  }
  std::string name() const { return cpu ? "CPU" : "CUDA (device " + std::to_string(index) + ")"; }
};

void require_shape(const Place& on, const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  bool same = on.holds(t) && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (same) return;
  std::string want;
  for (const int64_t size : shape) want += (want.empty() ? "" : ", ") + std::to_string(size);
  refuse(std::string(name) + ": expected a " + on.name() + " tensor of shape [" + want + "], got " +
         shape_text(t));
}

template <class C>
constexpr ScalarType kType = sizeof(C) == 4 ? ScalarType::Float : ScalarType::Double;

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A contiguous tensor of the shape given. (The C shim directly: new_empty through the dispatcher costs
// 1.5 us, and a backward pass makes fifteen.)
Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Place& on = Place()) {
  int64_t strides[4], elements = 1;
  require(shape.size() <= 4, "at most four dimensions");
  for (size_t i = shape.size(); i-- > 0; elements *= std::max<int64_t>(shape[i], 1)) strides[i] = elements;
  const int32_t dtype = type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  const int32_t device = on.cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides, dtype,
                                                         device, on.index, &handle));
  return Tensor(handle);
}

std::vector<int64_t> sizes(const Tensor& t) {
  const auto shape = t.sizes();
  return {shape.begin(), shape.end()};
}

template <class C>
C* data(const Tensor& t) {
  return static_cast<C*>(t.mutable_data_ptr());
}

// Calls f with a value of the type in which parameters of this dtype are computed with.
template <class F>
auto with_type(const Tensor& parameter, F f) {
  if (parameter.scalar_type() == ScalarType::Double) return f(double{});
  require(parameter.scalar_type() == ScalarType::Float, "parameters must be float32 or float64");
  return f(float{});
}

// A parameter in the precision of the computation, contiguous; keeps a copy alive where one was needed.
template <class C>
class Parameter {
 public:
  Parameter(const Place& on, const Tensor& t, const std::vector<int64_t>& shape, const char* name)
      : Parameter(on, t, name) {
    require_shape(on, t, shape, name);
  }
  Parameter(const Tensor& t, const std::vector<int64_t>& shape, const char* name)
      : Parameter(Place(), t, shape, name) {}
  Parameter(const Tensor& t, const char* name) : Parameter(Place(), t, name) {}
  Parameter(const Place& on, const Tensor& t, const char* name) : tensor_(dense(t)) {
    if (!on.holds(t)) refuse(std::string(name) + " must be a " + on.name() + " tensor");
    require(t.scalar_type() == kType<C>, "all parameters must have the same dtype, float32 or float64");
  }
  const C* get() const { return static_cast<const C*>(tensor_.const_data_ptr()); }
  operator const C*() const { return get(); }

 private:
  Tensor tensor_;
};

template <class C>
const C* one_value(const Place& on, const Tensor& t, const char* complaint) {
  require(on.holds(t) && t.numel() == 1 && t.scalar_type() == kType<C>, complaint);
  return static_cast<const C*>(t.const_data_ptr());
}

Storage storage(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      refuse("features must be float32, float64, bfloat16 or float16");
  }
}

// [T, rows, D], or a bank [n, D] with an index [T, rows] into it. Rows must be contiguous, nothing else need
// be. On a GPU the kernels look at the index' values.
struct FeatureTensor {
  Tensor tensor, index;
  Features features;
  int64_t T, D;

  FeatureTensor(const Place& on, const Tensor& t, const Optional& rows, const char* name)
      : tensor(t), index(rows ? dense(*rows) : t) {
    const bool bank = rows.has_value();
    if (!on.holds(t) || t.dim() != (bank ? 2 : 3)) {
      refuse(std::string(name) + ": expected a " + on.name() + " tensor " +
             (bank ? "[n, D]" : "[T, rows, D]") + ", got " + shape_text(t));
    }
    D = t.size(-1);
    if (t.stride(-1) != 1 && D > 1) tensor = torch::stable::contiguous(t);
    if (bank) {
      require(on.holds(index) && index.dim() == 2 && index.scalar_type() == ScalarType::Long,
              "an index must be a tensor [T, rows], int64, on the bank's device");
      const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
      if (on.cpu) check_index(i, index.numel(), t.size(0), name);
      T = index.size(0);
      features = {tensor.const_data_ptr(), storage(t), index.size(1), 0, tensor.stride(0), i, t.size(0)};
    } else {
      T = t.size(0);
      features = {tensor.const_data_ptr(), storage(t), t.size(1), tensor.stride(0),
                  tensor.stride(1),        nullptr,    0};
    }
  }

 private:
  static void check_index(const int64_t* index, int64_t count, int64_t n, const char* name) {
    for (int64_t j = 0; j < count; ++j) {
      if (index[j] < 0 || index[j] >= n) {
        refuse(std::string(name) + ": index " + std::to_string(index[j]) + " is outside of the bank's " +
               std::to_string(n) + " rows");
      }
    }
  }
};

// Labels [T, rows]; their values are looked at by ClassLists or require_below on a CPU, by the kernels on a
// GPU.
class Labels {
 public:
  Labels(const Place& on, const Tensor& labels, int64_t T, int64_t rows, const char* name = "support_labels")
      : tensor_(dense(labels)), T_(T), rows_(rows), name_(name) {
    require_shape(on, labels, {T, rows}, name);
    if (labels.scalar_type() != ScalarType::Long) refuse(std::string(name) + " must be int64");
  }
  const int64_t* get() const { return static_cast<const int64_t*>(tensor_.const_data_ptr()); }

  void require_below(int64_t N) const {
    const int64_t* label = get();
    for (int64_t i = 0; i < T_ * rows_; ++i) {
      if (label[i] >= 0 && label[i] < N) continue;
      refuse(std::string(name_) + ": task " + std::to_string(i / rows_) + " has label " +
             std::to_string(label[i]) + "; labels must be in 0.." + std::to_string(N - 1));
    }
  }

 private:
  Tensor tensor_;
  int64_t T_, rows_;
  const char* name_;
};

struct MlpTensors {
  const Tensor &weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3;
};

// The MLP's parameters, held.
template <class C>
class MlpParameters {
 public:
  MlpParameters(const Place& on, const MlpTensors& m, const Optional& running, int64_t N, int64_t H)
      : weight1_(on, m.weight1, {H, N}, "weight1"),
        bias1_(on, m.bias1, {H}, "bias1"),
        gain1_(on, m.gain1, {H}, "gain1"),
        shift1_(on, m.shift1, {H}, "shift1"),
        weight2_(on, m.weight2, {H, H}, "weight2"),
        bias2_(on, m.bias2, {H}, "bias2"),
        gain2_(on, m.gain2, {H}, "gain2"),
        shift2_(on, m.shift2, {H}, "shift2"),
        weight3_(on, m.weight3, {N, H}, "weight3"),
        bias3_(on, m.bias3, {N}, "bias3") {
    if (running) running_.emplace(on, *running, std::initializer_list<int64_t>{2, 2, H}, "running_stats");
  }

  MlpArrays<const C> arrays() const {
    return {weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_};
  }
  const C* running() const { return running_ ? running_->get() : nullptr; }

 private:
  Parameter<C> weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_;
  std::optional<Parameter<C>> running_;
};

struct MlpGradTensors {
  Tensor weight1, bias1, gain1, shift1, weight2, bias2, gain2, shift2, weight3, bias3;

  MlpGradTensors(const Sizes& s, ScalarType type, const Place& on = Place())
      : weight1(empty({s.H, s.N}, type, on)),
        bias1(empty({s.H}, type, on)),
        gain1(empty({s.H}, type, on)),
        shift1(empty({s.H}, type, on)),
        weight2(empty({s.H, s.H}, type, on)),
        bias2(empty({s.H}, type, on)),
        gain2(empty({s.H}, type, on)),
        shift2(empty({s.H}, type, on)),
        weight3(empty({s.N, s.H}, type, on)),
        bias3(empty({s.N}, type, on)) {}

  template <class C>
  MlpArrays<C> arrays() const {
    return {data<C>(weight1), data<C>(bias1), data<C>(gain1),  data<C>(shift1),  data<C>(weight2),
            data<C>(bias2),   data<C>(gain2), data<C>(shift2), data<C>(weight3), data<C>(bias3)};
  }
};

// Arguments that sib and its backward share.
template <class C>
struct SibArguments {
  Place on;
  FeatureTensor query, start;
  std::optional<Labels> labels;
  std::optional<Parameter<C>> weight;
  MlpParameters<C> mlp;
  SibProblem<C> problem;

  SibArguments(const Tensor& query_rows, const Optional& query_index, const Tensor& start_rows,
               const Optional& start_index, const Optional& support_labels, const Optional& weight_tensor,
               const Tensor& scale, const Tensor& bias, const MlpTensors& m, const Optional& running,
               int64_t steps, double lr, bool weights)
      : on(query_rows),
        query(on, query_rows, query_index, "query"),
        start(on, start_rows, start_index, "support"),
        mlp(on, m, running, m.weight1.size(-1), m.weight1.size(0)) {
    const Sizes s{
        query.T, start.features.rows, query.features.rows, m.weight1.size(-1), query.D, m.weight1.size(0),
        steps};
    require(start.T == s.T && start.D == s.D, "support and query must have the same T and D");
    require(steps >= 0, "steps must not be negative");
    require(s.N >= 1 && s.Q >= 1 && s.H >= 1 && s.D >= 1,
            "ways, query rows, hidden units and features: at least one each");
    if (support_labels) {
      labels.emplace(on, *support_labels, s.T, s.S);
      if (weight_tensor) weight.emplace(on, *weight_tensor, std::initializer_list<int64_t>{s.D}, "weight");
    } else {
      require(s.S == s.N, "without support_labels the start is theta0, [T, N, D]");
    }
    const Storage own = sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64;
    for (const FeatureTensor* f : {&query, &start}) {
      require(f->features.storage == own || (sizeof(C) == 4 && f->features.storage != Storage::kFloat64),
              "float64 features need float64 parameters, and float64 parameters float64 features");
    }
    problem = {s,
               query.features,
               start.features,
               {labels ? labels->get() : nullptr, nullptr, nullptr},
               weight ? weight->get() : nullptr,
               one_value<C>(on, scale, "scale must be one value, of the parameters' dtype"),
               one_value<C>(on, bias, "bias must be one value, of the parameters' dtype"),
               C(lr),
               mlp.arrays(),
               mlp.running(),
               weights};
  }
};

// What sib_backward takes beside them, and its results.
template <class C>
struct SibBackwardArguments {
  Parameter<C> grad_logits, trace;
  std::optional<Parameter<C>> grad_weights;
  Tensor grad_query, grad_start, grad_weight, grad_scale, grad_bias;
  MlpGradTensors mlp;
  SibBackward<C> run;

  SibBackwardArguments(const SibArguments<C>& a, const Tensor& gz, const Optional& gw, const Tensor& saved,
                       const Tensor& scale, const Tensor& bias, bool need_query, bool need_start)
      : grad_logits(a.on, gz, {a.problem.s.T, a.problem.s.Q, a.problem.s.N}, "grad_logits"),
        trace(a.on, saved, {a.problem.s.T, trace_size<C>(a.problem.s, a.problem.weights)}, "trace"),
        grad_query(maybe(need_query, {a.problem.s.T, a.problem.s.Q, a.problem.s.D}, a.on)),
        grad_start(maybe(need_start, {a.problem.s.T, a.problem.s.S, a.problem.s.D}, a.on)),
        grad_weight(maybe(a.problem.weight != nullptr, {a.problem.s.D}, a.on)),
        grad_scale(empty(sizes(scale), kType<C>, a.on)),
        grad_bias(empty(sizes(bias), kType<C>, a.on)),
        mlp(a.problem.s, kType<C>, a.on) {
    const Sizes& s = a.problem.s;
    if (gw) {
      require(a.problem.weights, "grad_weights without return_weights");
      grad_weights.emplace(a.on, *gw, std::initializer_list<int64_t>{s.T, s.N, s.D}, "grad_weights");
    }
    run = {a.problem,
           trace,
           grad_logits,
           grad_weights ? grad_weights->get() : nullptr,
           need_query ? data<C>(grad_query) : nullptr,
           need_start ? data<C>(grad_start) : nullptr};
  }

  auto results() const {
    return std::tuple{grad_query,  grad_start, grad_weight, grad_scale,  grad_bias,
                      mlp.weight1, mlp.bias1,  mlp.gain1,   mlp.shift1,  mlp.weight2,
                      mlp.bias2,   mlp.gain2,  mlp.shift2,  mlp.weight3, mlp.bias3};
  }

 private:
  static Tensor maybe(bool wanted, const std::vector<int64_t>& shape, const Place& on) {
    return empty(wanted ? shape : std::vector<int64_t>{0}, kType<C>, on);
  }
};

template <class C>
struct MlpArguments {
  Place on;
  MlpParameters<C> parameters;
  Parameter<C> logits;
  MlpProblem<C> problem;

  MlpArguments(const Tensor& rows, const MlpTensors& m, const Optional& running)
      : on(rows),
        parameters(on, m, running, m.weight1.size(-1), m.weight1.size(0)),
        logits(on, rows, {rows.size(0), rows.size(1), m.weight1.size(-1)}, "logits") {
    Sizes s{};
    s.T = rows.size(0);
    s.Q = rows.size(1);
    s.N = m.weight1.size(-1);
    s.H = m.weight1.size(0);
    require(s.Q >= 1 && s.N >= 1 && s.H >= 1, "rows, ways and hidden units: at least one each");
    problem = {s, parameters.arrays(), parameters.running(), logits};
  }
};

template <class C>
struct ClassMeansArguments {
  Place on;
  FeatureTensor support;
  Labels labels;
  std::optional<Parameter<C>> weight;
  ClassMeansProblem<C> problem;

  ClassMeansArguments(const Tensor& rows, const Tensor& support_labels, int64_t n_way,
                      const Optional& weight_tensor)
      : on(rows),
        support(on, rows, std::nullopt, "support"),
        labels(on, support_labels, support.T, support.features.rows) {
    Sizes s{};
    s.T = support.T;
    s.S = support.features.rows;
    s.N = n_way;
    s.D = support.D;
    require(s.N >= 1 && s.D >= 1, "ways and features: at least one each");
    if (weight_tensor) weight.emplace(on, *weight_tensor, std::initializer_list<int64_t>{s.D}, "weight");
    require((support.features.storage == Storage::kFloat64) == (sizeof(C) == 8),
            "float64 features need a float64 weight, and a float64 weight float64 features");
    problem = {s, support.features, {labels.get(), nullptr, nullptr}, weight ? weight->get() : nullptr};
  }
};

// Arguments that linear_head and its backward share.
template <class C>
struct HeadArguments {
  Place on;
  FeatureTensor support, query;
  Labels labels;
  Parameter<C> weight, bias, rates;
  HeadProblem<C> problem;

  HeadArguments(const Tensor& support_rows, const Optional& support_index, const Tensor& support_labels,
                const Tensor& query_rows, const Optional& query_index, const Tensor& w, const Tensor& b,
                const Tensor& r, int64_t oracle, bool first_order)
      : on(query_rows),
        support(on, support_rows, support_index, "support"),
        query(on, query_rows, query_index, "query"),
        labels(on, support_labels, support.T, support.features.rows),
        weight(on, w, {w.dim() == 2 ? w.size(0) : -1, support.D}, "weight"),
        bias(on, b, {w.size(0)}, "bias"),
        rates(on, r, {r.numel()}, "rates") {
    Sizes s{};
    s.T = query.T;
    s.S = support.features.rows;
    s.Q = query.features.rows;
    s.N = w.size(0);
    s.D = query.D;
    s.K = r.numel();
    require(support.T == s.T && support.D == s.D, "support and query must have the same T and D");
    require(s.N >= 1 && s.Q >= 1 && s.S >= 1 && s.D >= 1, "ways, rows and features: at least one each");
    require(oracle >= 0 && oracle <= 2, "oracle: 0 (cross entropy), 1 (squared error) or 2 (hinge)");
    const Storage own = sizeof(C) == 4 ? Storage::kFloat32 : Storage::kFloat64;
    for (const FeatureTensor* f : {&query, &support}) {
      require(f->features.storage == own || (sizeof(C) == 4 && f->features.storage != Storage::kFloat64),
              "float64 features need float64 parameters, and float64 parameters float64 features");
    }
    if (on.cpu) labels.require_below(s.N);
    problem = {s,
               support.features,
               query.features,
               labels.get(),
               weight,
               bias,
               rates,
               static_cast<Oracle>(oracle),
               first_order};
  }
};

// What linear_head_backward takes beside them, and its results.
template <class C>
struct HeadBackwardArguments {
  Parameter<C> grad_logits, trace;
  std::optional<Parameter<C>> grad_heads;
  Tensor grad_support, grad_query, grad_weight, grad_bias, grad_rates;
  HeadBackward<C> run;

  HeadBackwardArguments(const HeadArguments<C>& a, const Tensor& gz, const Optional& gh, const Tensor& saved,
                        bool need_support, bool need_query)
      : grad_logits(a.on, gz, {a.problem.s.T, a.problem.s.Q, a.problem.s.N}, "grad_logits"),
        trace(a.on, saved, {a.problem.s.T, head_trace_size<C>(a.problem.s)}, "trace"),
        grad_weight(empty({a.problem.s.N, a.problem.s.D}, kType<C>, a.on)),
        grad_bias(empty({a.problem.s.N}, kType<C>, a.on)),
        grad_rates(empty({a.problem.s.K}, kType<C>, a.on)) {
    const Sizes& s = a.problem.s;
    const std::vector<int64_t> none{0};
    grad_support = empty(need_support ? std::vector{s.T, s.S, s.D} : none, kType<C>, a.on);
    grad_query = empty(need_query ? std::vector{s.T, s.Q, s.D} : none, kType<C>, a.on);
    if (gh) grad_heads.emplace(a.on, *gh, std::initializer_list<int64_t>{s.T, s.N, s.D + 1}, "grad_heads");
    run = {a.problem,
           trace,
           grad_logits,
           grad_heads ? grad_heads->get() : nullptr,
           need_support ? data<C>(grad_support) : nullptr,
           need_query ? data<C>(grad_query) : nullptr};
  }

  auto results() const { return std::tuple{grad_support, grad_query, grad_weight, grad_bias, grad_rates}; }
};

}  // namespace
