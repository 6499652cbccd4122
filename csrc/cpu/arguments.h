// Tensors of a raw op, checked and turned into what the kernels take.
//
// Callers in kernelmeta/ops have checked arguments with better messages; the checks here are what keeps a
// direct call of a raw op from reading memory it should not. Errors are std::invalid_argument, which Python
// sees as ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernel_table.h"
#include "engine/fold.h"

namespace {

using namespace kernelmeta;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void require_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  bool same = t.is_cpu() && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (same) return;
  std::string want;
  for (const int64_t size : shape) want += (want.empty() ? "" : ", ") + std::to_string(size);
  refuse(std::string(name) + ": expected a CPU tensor of shape [" + want + "], got " + shape_text(t));
}

template <class C>
constexpr ScalarType kType = sizeof(C) == 4 ? ScalarType::Float : ScalarType::Double;

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A contiguous CPU tensor of the shape given. (The C shim directly: new_empty through the dispatcher
// costs 1.5 us, and a backward pass makes fifteen.)
Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  int64_t strides[4], elements = 1;
  require(shape.size() <= 4, "at most four dimensions");
  for (size_t i = shape.size(); i-- > 0; elements *= std::max<int64_t>(shape[i], 1)) strides[i] = elements;
  const int32_t dtype = type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
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

// A parameter in the precision of the computation, contiguous; keeps a copy alive where one was needed.
template <class C>
class Parameter {
 public:
  Parameter(const Tensor& t, const std::vector<int64_t>& shape, const char* name) : Parameter(t, name) {
    require_shape(t, shape, name);
  }
  Parameter(const Tensor& t, const char* name) : tensor_(dense(t)) {
    if (!t.is_cpu()) refuse(std::string(name) + " must be a CPU tensor");
    require(t.scalar_type() == kType<C>, "all parameters must have the same dtype, float32 or float64");
  }
  const C* get() const { return static_cast<const C*>(tensor_.const_data_ptr()); }
  operator const C*() const { return get(); }

 private:
  Tensor tensor_;
};

template <class C>
C scalar(const Tensor& t, const char* name) {
  require(t.is_cpu() && t.numel() == 1 && t.scalar_type() == kType<C>, name);
  return *static_cast<const C*>(t.const_data_ptr());
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
// be.
struct FeatureTensor {
  Tensor tensor, index;
  Features features;
  int64_t T, D;

  FeatureTensor(const Tensor& t, const std::optional<Tensor>& rows, const char* name)
      : tensor(t), index(rows ? dense(*rows) : t) {
    const bool bank = rows.has_value();
    if (!t.is_cpu() || t.dim() != (bank ? 2 : 3)) {
      refuse(std::string(name) + ": expected a CPU tensor " + (bank ? "[n, D]" : "[T, rows, D]") + ", got " +
             shape_text(t));
    }
    D = t.size(-1);
    if (t.stride(-1) != 1 && D > 1) tensor = torch::stable::contiguous(t);
    if (bank) {
      require(index.is_cpu() && index.dim() == 2 && index.scalar_type() == ScalarType::Long,
              "an index must be a CPU tensor [T, rows], int64");
      const auto* i = static_cast<const int64_t*>(index.const_data_ptr());
      const int64_t n = t.size(0), count = index.numel();
      for (int64_t j = 0; j < count; ++j) {
        if (i[j] < 0 || i[j] >= n) {
          refuse(std::string(name) + ": index " + std::to_string(i[j]) + " is outside of the bank's " +
                 std::to_string(n) + " rows");
        }
      }
      T = index.size(0);
      features = {tensor.const_data_ptr(), storage(t), index.size(1), 0, tensor.stride(0), i};
    } else {
      T = t.size(0);
      features = {tensor.const_data_ptr(), storage(t),       t.size(1),
                  tensor.stride(0),        tensor.stride(1), nullptr};
    }
  }
};

// Labels [T, S], checked, as lists of members of every class.
class ClassLists {
 public:
  ClassLists(const Tensor& labels, int64_t T, int64_t S, int64_t N) : members_(T * S), offsets_(T * (N + 1)) {
    require_shape(labels, {T, S}, "support_labels");
    require(labels.scalar_type() == ScalarType::Long, "support_labels must be int64");
    const Tensor rows = dense(labels);
    const auto* label = static_cast<const int64_t*>(rows.const_data_ptr());
    for (int64_t t = 0; t < T; ++t, label += S) {
      int32_t* offset = offsets_.data() + t * (N + 1);
      for (int64_t i = 0; i < S; ++i) {
        if (label[i] < 0 || label[i] >= N) {
          refuse("support_labels: task " + std::to_string(t) + " has label " + std::to_string(label[i]) +
                 "; labels must be in 0.." + std::to_string(N - 1));
        }
        ++offset[label[i] + 1];
      }
      for (int64_t n = 0; n < N; ++n) {
        if (offset[n + 1] == 0) {
          refuse("support_labels: task " + std::to_string(t) + " has no row of class " + std::to_string(n) +
                 "; every class needs at least one support row");
        }
        offset[n + 1] += offset[n];
      }
      std::vector<int32_t> next(offset, offset + N);
      for (int64_t i = 0; i < S; ++i) members_[t * S + next[label[i]]++] = int32_t(i);
    }
  }
  ClassTable table() const { return {members_.data(), offsets_.data()}; }

 private:
  std::vector<int32_t> members_, offsets_;
};

struct MlpTensors {
  const Tensor &weight1, &bias1, &gain1, &shift1, &weight2, &bias2, &gain2, &shift2, &weight3, &bias3;
};

// The MLP's parameters, held, and folded.
template <class C>
class FoldedParameters {
 public:
  FoldedParameters(const MlpTensors& m, const std::optional<Tensor>& running, int64_t N, int64_t H)
      : weight1_(m.weight1, {H, N}, "weight1"),
        bias1_(m.bias1, {H}, "bias1"),
        gain1_(m.gain1, {H}, "gain1"),
        shift1_(m.shift1, {H}, "shift1"),
        weight2_(m.weight2, {H, H}, "weight2"),
        bias2_(m.bias2, {H}, "bias2"),
        gain2_(m.gain2, {H}, "gain2"),
        shift2_(m.shift2, {H}, "shift2"),
        weight3_(m.weight3, {N, H}, "weight3"),
        bias3_(m.bias3, {N}, "bias3") {
    if (running) running_.emplace(*running, std::initializer_list<int64_t>{2, 2, H}, "running_stats");
    Sizes s{};
    s.N = N;
    s.H = H;
    const C* stats = running_ ? running_->get() : nullptr;
    memory_.reset(new C[size_t(padded(H * H) + padded(H) + padded(N * H) + padded(N) + padded(2 * H))]);
    Arena<C> arena(memory_.get());
    folded = fold<C>(arrays(), stats, s, arena);
  }

  MlpArrays<const C> arrays() const {
    return {weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_};
  }

  FoldedMlp<C> folded;

 private:
  Parameter<C> weight1_, bias1_, gain1_, shift1_, weight2_, bias2_, gain2_, shift2_, weight3_, bias3_;
  std::optional<Parameter<C>> running_;
  std::unique_ptr<C[]> memory_;
};

}  // namespace
