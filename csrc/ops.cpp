// Schemas of torch.ops.kernelmeta and the functions behind them for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/dispatch.h"

namespace {

using torch::stable::Tensor;

// A contiguous copy of x. The template of an op, and the measure of what calling any op costs.
Tensor noop(const Tensor& x) {
  const Tensor from = torch::stable::contiguous(x);
  const Tensor to = torch::stable::new_empty(x, x.sizes());
  if (to.numel() == 0) {
    return to;
  }
  kernelmeta::cpu::kernels().copy(static_cast<const char*>(from.const_data_ptr()),
                                  static_cast<char*>(to.mutable_data_ptr()),
                                  to.numel() * static_cast<int64_t>(to.element_size()));
  return to;
}

// Name of the instruction set that the kernels run with.
std::string cpu_isa() { return kernelmeta::cpu::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(kernelmeta, library) {
  library.def("noop(Tensor x) -> Tensor");
  library.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) { library.impl("noop", TORCH_BOX(&noop)); }

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
