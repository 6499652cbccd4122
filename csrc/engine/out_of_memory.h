// Memory that a call needs and the system does not give: MemoryError in Python.
#pragma once

#include <new>
#include <string>
#include <utility>

namespace kernelmeta {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

}  // namespace kernelmeta
