#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include "kernel_table.h"
namespace kernelmeta {
extern const KernelTable kernels_avx512;
const KernelTable& kernel_table() { return kernels_avx512; }
void* scratch(int64_t bytes) {
  struct Buffer { void* p=nullptr; int64_t size=0; ~Buffer(){ std::free(p);} };
  thread_local Buffer b;
  if (bytes > b.size) { std::free(b.p); b.p=nullptr; b.size=0; int64_t n=(bytes+63)/64*64; b.p=std::aligned_alloc(64,size_t(n)); if(!b.p) throw std::bad_alloc(); b.size=n; }
  return b.p;
}
}
