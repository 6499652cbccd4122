#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    mlp_fwd_kernel(const __grid_constant__ MlpProblem<C> p, C* out, Memory<C> memory) {
  mlp_forward_body<B>(block_memory<B, MlpLayout<B>>(), p, out, memory.template arena<B>(), block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    mlp_bwd_kernel(const __grid_constant__ MlpProblem<C> p, const C* grad_out, C* grad_logits, C* partials,
                   Memory<C> memory) {
  C* own = partials + blockIdx.x * MlpLayout<B>::sums_size(as<typename B::Sizes>(p.s));
  mlp_backward_body<B>(block_memory<B, MlpLayout<B>>(), p, grad_out, grad_logits, own,
                       memory.template arena<B>(), block_tasks());
}

}  // namespace

template <class C>
Plan plan_mlp(const MlpProblem<C>& p, bool backward, int device) {
  using B = CudaBlock<C>;
  const void* kernel = backward ? reinterpret_cast<const void*>(&mlp_bwd_kernel<B>)
                                : reinterpret_cast<const void*>(&mlp_fwd_kernel<B>);
  return make_plan<B, MlpLayout<B>>(kernel, p.s, device, p, backward);
}

template <class C>
void launch_mlp_forward(const MlpProblem<C>& p, C* out, const Plan& plan, C* workspace,
                        const Stream& stream) {
  launch<CudaBlock<C>>("synthetic_gradient_mlp", &mlp_fwd_kernel<CudaBlock<C>>, plan, stream, p, out,
                       Memory<C>{plan.capacity, workspace, plan.workspace});
}

template <class C>
void launch_mlp_backward(const MlpProblem<C>& p, const C* grad_out, C* grad_logits, const Plan& plan,
                         C* workspace, C* partials, const Stream& stream) {
  launch<CudaBlock<C>>("synthetic_gradient_mlp_backward", &mlp_bwd_kernel<CudaBlock<C>>, plan, stream, p,
                       grad_out, grad_logits, partials, Memory<C>{plan.capacity, workspace, plan.workspace});
}

#define INSTANTIATE(C)                                                                        \
  template Plan plan_mlp(const MlpProblem<C>&, bool, int);                                    \
  template void launch_mlp_forward(const MlpProblem<C>&, C*, const Plan&, C*, const Stream&); \
  template void launch_mlp_backward(const MlpProblem<C>&, const C*, C*, const Plan&, C*, C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
