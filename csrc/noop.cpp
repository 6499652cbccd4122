// Two small ops that describe the library rather than compute: what calling any op costs, and with
// which instructions the kernels run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>

#include "cpu/kernel_table.h"

namespace {

using torch::stable::Tensor;

// A contiguous copy of x.
Tensor noop(const Tensor& x) {
  const Tensor from = torch::stable::contiguous(x);
  const Tensor to = torch::stable::new_empty(x, x.sizes());
  if (to.numel() > 0) {
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(),
                static_cast<size_t>(to.numel()) * to.element_size());
  }
  return to;
}

std::string cpu_isa() { return kernelmeta::kernel_table().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kernelmeta, library) {
  library.def("noop(Tensor x) -> Tensor");
  library.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) { library.impl("noop", TORCH_BOX(&noop)); }

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
