// Working memory of the kernels.
#pragma once

#include <cstdint>

namespace kernelmeta {

// At least `bytes` bytes, aligned to 64, owned by the calling thread: valid until its next call, and kept between
// calls, because fresh pages from the operating system cost more than a small task. Throws std::bad_alloc.
void* scratch(int64_t bytes);

}  // namespace kernelmeta
