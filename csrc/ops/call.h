// What a raw op is called with, by name. A call is a struct whose members read themselves from the
// dispatcher's stack in the order in which they are declared:
//
//   struct NormsCall {
//     Reader& in;
//     Tensor rows = in.take<Tensor>("rows");
//     double floor = in.take<double>("floor");
//   };
//
// The same members, read by a Reader that has no stack, write the op's schema down. kernelmeta/ops declares
// schemas too; tests/ops/test_schemas.py holds the two against each other.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/out_of_memory.h"

namespace kernelmeta {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Reader {
 public:
  explicit Reader(StableIValue* stack) : stack_(stack) {}
  explicit Reader(std::string* schema) : schema_(schema) {}

  template <class T>
  T take(const char* name) {
    if (schema_) {
      *schema_ += (schema_->empty() ? "" : ", ") + std::string(kind<T>()) + " " + name;
      return T();
    }
    return torch::stable::detail::to<T>(*stack_++);
  }

 private:
  template <class T>
  static const char* kind() {
    if constexpr (std::is_same_v<T, Tensor>)
      return "Tensor";
    else if constexpr (std::is_same_v<T, OptionalTensor>)
      return "Tensor?";
    else if constexpr (std::is_same_v<T, int64_t>)
      return "int";
    else if constexpr (std::is_same_v<T, double>)
      return "float";
    else if constexpr (std::is_same_v<T, bool>)
      return "bool";
    else
      static_assert(std::is_same_v<T, std::vector<int64_t>>, "a type that no op takes yet");
    return "int[]";
  }

  StableIValue* stack_ = nullptr;
  std::string* schema_ = nullptr;
};

template <size_t n>
using Tensors = std::array<Tensor, n>;

// An op: a struct with its `name`, its `Call`, how many `results` it has, and `run<Device>(const Call&)`.
template <class Op>
std::string schema_of() {
  std::string arguments;
  Reader in(&arguments);
  [[maybe_unused]] const typename Op::Call call{in};
  std::string results = "Tensor";
  for (size_t i = 1; i < Op::results; ++i) results += ", Tensor";
  return std::string(Op::name) + "(" + arguments + ") -> " +
         (Op::results == 1 ? results : "(" + results + ")");
}

template <class Op, class Device>
Tensors<Op::results> run(const typename Op::Call& call) {
  const char* failed = ": no memory for tasks of these sizes";
  try {
    return Op::template run<Device>(call);
  } catch (const OutOfMemory&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(Op::name + std::string(failed));
  } catch (const std::length_error&) {
    throw OutOfMemory(Op::name + std::string(failed));
  }
}

template <class Op, class Device>
void boxed(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  static const uint64_t expected = [] {
    const std::string schema = schema_of<Op>();
    const std::string arguments = schema.substr(0, schema.find(" -> "));
    uint64_t commas = 0;
    for (const char c : arguments) commas += c == ',';
    return commas + 1;
  }();
  if (n_arguments != expected || n_results != Op::results) {
    throw std::runtime_error(std::string(Op::name) + ": the library and the package that declares it differ");
  }
  Reader in(stack);
  const typename Op::Call call{in};
  const Tensors<Op::results> results = run<Op, Device>(call);
  for (size_t i = 0; i < Op::results; ++i) stack[i] = torch::stable::detail::from(results[i]);
}

}  // namespace kernelmeta
