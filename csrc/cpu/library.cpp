// libkernelmeta_cpu: the CPU's kernels under their names in torch.ops.kernelmeta, and what the library says
// of itself. Schemas stand in kernelmeta/ops beside the fake kernels and the derivatives. Only PyTorch's
// stable ABI is used.
#include <cstring>

#include "cpu/class_means.h"
#include "cpu/focal_distillation.h"
#include "cpu/linear_head.h"
#include "cpu/linearised_descent.h"
#include "cpu/ntk_gram.h"
#include "cpu/program.h"
#include "cpu/ridge.h"
#include "cpu/sib.h"
#include "cpu/synthetic_gradient_mlp.h"
#include "ops/all.h"

namespace kernelmeta {
namespace {

// A contiguous copy: what calling any op costs.
struct NoopCall {
  Reader& in;
  Tensor x = in.take<Tensor>("x");
};

struct NoopOp {
  static constexpr const char* name = "noop";
  static constexpr size_t results = 1;
  using Call = NoopCall;

  template <class Device>
  static Tensors<results> run(const Call& call) {
    const Tensor from = dense(call.x);
    const Tensor to = torch::stable::new_empty(call.x, call.x.sizes());
    if (to.numel() > 0)
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), size_t(to.numel()) * to.element_size());
    return {to};
  }
};

// With which instructions the kernels run.
std::string cpu_isa() { return kernel_table().isa; }

// What C++ takes each op's schema to be, one a line. Of the ops on CUDA tensors too: they are registered from
// the same list.
std::string schemas(std::string device) {
  if (device == "cuda") return AllOps::schemas();
  require(device == "cpu", "schemas: expected cpu or cuda");
  return AllOps::schemas() + TrainingOps::schemas() + schema_of<NoopOp>() + "\n";
}

}  // namespace
}  // namespace kernelmeta

STABLE_TORCH_LIBRARY_FRAGMENT(kernelmeta, library) {
  library.def("noop(Tensor x) -> Tensor");
  library.def("cpu_isa() -> str");
  library.def("schemas(str device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CPU, library) {
  using namespace kernelmeta;
  AllOps::register_on<cpu::Device>(library);
  TrainingOps::register_on<cpu::Device>(library);
  OpList<NoopOp>::register_on<cpu::Device>(library);
}

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&kernelmeta::cpu_isa));
  library.impl("schemas", TORCH_BOX(&kernelmeta::schemas));
}
