// Tensors of a raw op, checked and turned into what the kernels take; the same for every device.
//
// Callers in kernelmeta/ops have checked arguments with better messages; the checks here are what keeps a
// direct call of a raw op from reading memory it should not. Errors are std::invalid_argument, which Python
// sees as ValueError, and OutOfMemory, which it sees as MemoryError.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/out_of_memory.h"
#include "engine/problem.h"
#include "ops/call.h"

namespace kernelmeta {

using torch::headeronly::ScalarType;
using Shape = std::vector<int64_t>;

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

inline void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

inline std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline Shape shape_of(const Tensor& t) {
  const auto shape = t.sizes();
  return {shape.begin(), shape.end()};
}

// What a call needs, counted before anything is computed from sizes that could wrap around: sums of products,
// each at most kMost elements.
class Elements {
 public:
  Elements& add(std::initializer_list<int64_t> factors) {
    long double product = 1;
    for (const int64_t factor : factors) {
      require(factor >= 0, "sizes must not be negative");
      product *= static_cast<long double>(factor);
    }
    total_ += product;
    if (total_ > kMost) {
      std::string text;
      for (const int64_t factor : factors) text += (text.empty() ? "" : " x ") + std::to_string(factor);
      throw OutOfMemory("this call would need arrays of " + text + " elements");
    }
    return *this;
  }

 private:
  static constexpr long double kMost = 1LL << 46;
  long double total_ = 0;
};

// Not initialised.
template <class C>
std::unique_ptr<C[]> allocate(int64_t elements) {
  C* memory = new (std::nothrow) C[size_t(elements)];
  if (!memory) throw OutOfMemory("no memory for " + std::to_string(elements * int64_t(sizeof(C))) + " bytes");
  return std::unique_ptr<C[]>(memory);
}

// The device that all tensors of a call must be on.
struct TensorDevice {
  bool cpu = true;
  int32_t index = 0;

  explicit TensorDevice(const Tensor& t) : cpu(t.is_cpu()), index(cpu ? 0 : t.get_device_index()) {}
  bool holds(const Tensor& t) const {
    return cpu ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index;
  }
  std::string name() const { return cpu ? "CPU" : "CUDA (device " + std::to_string(index) + ")"; }
};

inline void require_shape(const TensorDevice& on, const Tensor& t, const Shape& shape, const char* name) {
  bool same = on.holds(t) && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (same) return;
  refuse(std::string(name) + ": expected a " + on.name() + " tensor of shape " + shape_text(shape) +
         ", got " + shape_text(shape_of(t)));
}

template <class C>
constexpr ScalarType kType = sizeof(C) == 4 ? ScalarType::Float : ScalarType::Double;

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Memory of the CPU that comes fresh from the system, as that of large tensors does at every call: in pages
// of 2 MiB where the system has them, 512 times fewer to be asked for one by one. It is advice: what lies
// beside the tensor may share it.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] uint64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargestSmallPage = 1 << 16;
  if (bytes < uint64_t(1) << 21) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = begin / kLargestSmallPage * kLargestSmallPage;
  const uintptr_t end = (begin + bytes) / kLargestSmallPage * kLargestSmallPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A contiguous tensor. (The C shim directly: new_empty through the dispatcher costs 1.5 us, and a backward
// pass makes fifteen.)
inline Tensor empty_of(const TensorDevice& on, const Shape& shape, int32_t dtype, size_t element_size) {
  int64_t strides[4], elements = 1;
  require(shape.size() <= 4, "at most four dimensions");
  for (size_t i = shape.size(); i-- > 0; elements *= std::max<int64_t>(shape[i], 1)) strides[i] = elements;
  const int32_t device = on.cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides, dtype, device, on.index,
                               &handle) != AOTI_TORCH_SUCCESS) {
    throw OutOfMemory("no memory for a " + on.name() + " tensor of shape " + shape_text(shape) + ", " +
                      std::to_string(elements * int64_t(element_size)) + " bytes");
  }
  Tensor tensor(handle);
  if (on.cpu) prefer_large_pages(tensor.mutable_data_ptr(), uint64_t(tensor.numel()) * element_size);
  return tensor;
}

template <class C>
Tensor empty(const TensorDevice& on, const Shape& shape) {
  return empty_of(on, shape, sizeof(C) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
                  sizeof(C));
}

// Of uint8.
inline Tensor empty_bytes(const TensorDevice& on, const Shape& shape) {
  return empty_of(on, shape, aoti_torch_dtype_uint8(), 1);
}

// The same, or an empty one where it is not wanted.
template <class C>
Tensor empty_if(bool wanted, const TensorDevice& on, const Shape& shape) {
  return empty<C>(on, wanted ? shape : Shape{0});
}

template <class C>
C* data(const Tensor& t) {
  return static_cast<C*>(t.mutable_data_ptr());
}

// Null where the tensor was not wanted.
template <class C>
C* data_if(bool wanted, const Tensor& t) {
  return wanted ? data<C>(t) : nullptr;
}

inline const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// Calls f with a value of the type in which parameters of this dtype are computed with.
template <class F>
auto with_type(const Tensor& parameter, F f) {
  if (parameter.scalar_type() == ScalarType::Double) return f(double{});
  require(parameter.scalar_type() == ScalarType::Float, "parameters must be float32 or float64");
  return f(float{});
}

// A parameter in the precision of the computation, contiguous; keeps a copy alive where one was needed. One
// that was not given is a null pointer.
template <class C>
class Parameter {
 public:
  Parameter() = default;
  Parameter(const TensorDevice& on, const Tensor& t, const Shape& shape, const char* name)
      : tensor_(dense(t)) {
    require_shape(on, t, shape, name);
    require_type();
  }
  Parameter(const TensorDevice& on, const OptionalTensor& t, const Shape& shape, const char* name) {
    if (t) *this = Parameter(on, *t, shape, name);
  }
  // Of any shape.
  Parameter(const TensorDevice& on, const Tensor& t, const char* name) : tensor_(dense(t)) {
    if (!on.holds(t)) refuse(std::string(name) + " must be a " + on.name() + " tensor");
    require_type();
  }

  const C* get() const { return tensor_ ? static_cast<const C*>(tensor_->const_data_ptr()) : nullptr; }
  operator const C*() const { return get(); }

 private:
  OptionalTensor tensor_;

  void require_type() const {
    require(tensor_->scalar_type() == kType<C>,
            "all parameters must have the same dtype, float32 or float64");
  }
};

// A parameter of one value, whatever its shape; one that was not given is a null pointer.
template <class C>
const C* one_value(const TensorDevice& on, const OptionalTensor& t, const char* name) {
  if (!t) return nullptr;
  if (!on.holds(*t) || t->numel() != 1 || t->scalar_type() != kType<C>) {
    refuse(std::string(name) + " must be one value, of the parameters' dtype, on the features' device");
  }
  return static_cast<const C*>(t->const_data_ptr());
}

inline Storage storage(const Tensor& t) {
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

// Labels [T, rows]. On a CPU their values are looked at where the number of classes is given here; where it
// is not, by ClassLists. On a GPU the kernels look at them.
class Labels {
 public:
  Labels(const TensorDevice& on, const Tensor& labels, int64_t T, int64_t rows, const char* name,
         std::optional<int64_t> n_way = std::nullopt)
      : tensor_(dense(labels)) {
    require_shape(on, labels, {T, rows}, name);
    if (labels.scalar_type() != ScalarType::Long) refuse(std::string(name) + " must be int64");
    if (!on.cpu || !n_way) return;
    for (int64_t i = 0; i < T * rows; ++i) {
      const int64_t label = get()[i];
      if (label >= 0 && label < *n_way) continue;
      refuse(std::string(name) + ": task " + std::to_string(i / rows) + " has label " +
             std::to_string(label) + "; labels must be in 0.." + std::to_string(*n_way - 1));
    }
  }
  const int64_t* get() const { return integers(tensor_); }

 private:
  Tensor tensor_;
};

}  // namespace kernelmeta
