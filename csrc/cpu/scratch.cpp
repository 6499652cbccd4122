#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace kernelmeta {
namespace {

struct Buffer {
  void* memory = nullptr;
  int64_t size = 0;

  void reserve(int64_t bytes) {
    if (bytes <= size) return;
    const int64_t rounded = (bytes + 63) / 64 * 64;
    std::free(memory);
    size = 0;
    memory = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (memory == nullptr) throw std::bad_alloc();
    size = rounded;
  }
  ~Buffer() { std::free(memory); }
};

}  // namespace

void* scratch(int64_t bytes) {
  thread_local Buffer buffer;
  buffer.reserve(bytes);
  return buffer.memory;
}

}  // namespace kernelmeta
