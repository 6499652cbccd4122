// libkernelmeta_cuda: the CUDA kernels under their names in torch.ops.kernelmeta. Only PyTorch's stable ABI
// is used.
#include "cuda/class_means.h"
#include "cuda/focal_distillation.h"
#include "cuda/linear_head.h"
#include "cuda/linearised_descent.h"
#include "cuda/ntk_gram.h"
#include "cuda/program.h"
#include "cuda/ridge.h"
#include "cuda/sib.h"
#include "cuda/synthetic_gradient_mlp.h"
#include "ops/all.h"

STABLE_TORCH_LIBRARY_IMPL(kernelmeta, CUDA, library) {
  kernelmeta::AllOps::register_on<kernelmeta::cuda::Device>(library);
}
