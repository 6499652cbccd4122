#include "cuda/program.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    ridge_fwd_kernel(const __grid_constant__ RidgeForward<C> f, int64_t stride, Memory<C> memory) {
  ridge_forward_body<B>(block_memory<B, RidgeForwardLayout<B>>(), f, stride, memory.template arena<B>(),
                        block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    ridge_bwd_kernel(const __grid_constant__ RidgeBackward<C> f, int64_t stride, C* partials, int64_t size,
                     Memory<C> memory) {
  ridge_backward_body<B>(block_memory<B, RidgeBackwardLayout<B>>(), f, stride, partials + blockIdx.x * size,
                         size, memory.template arena<B>(), block_tasks());
}

}  // namespace

template <class C>
Plan plan_ridge_forward(const RidgeForward<C>& f, int64_t stride, const std::vector<int64_t>& tasks,
                        int device) {
  return with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_task_plan<B, RidgeForwardLayout<B>>(reinterpret_cast<const void*>(&ridge_fwd_kernel<B>), f,
                                                    tasks, Sizes{}, device, stride);
  });
}

template <class C>
Plan plan_ridge_backward(const RidgeBackward<C>& f, int64_t stride, const std::vector<int64_t>& tasks,
                         int device) {
  return with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_task_plan<B, RidgeBackwardLayout<B>>(reinterpret_cast<const void*>(&ridge_bwd_kernel<B>), f,
                                                     tasks, Sizes{}, device, stride);
  });
}

template <class C>
void launch_ridge_forward(const RidgeForward<C>& f, int64_t stride, const Plan& plan, C* workspace,
                          const Stream& stream) {
  with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("ridge", &ridge_fwd_kernel<B>, plan, stream, f, stride,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_ridge_backward(const RidgeBackward<C>& f, int64_t stride, const Plan& plan, C* workspace,
                           C* partials, const Stream& stream) {
  with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("ridge_backward", &ridge_bwd_kernel<B>, plan, stream, f, stride, partials,
              size_of<RidgeGrad<C>, C>(), Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                                   \
  template Plan plan_ridge_forward(const RidgeForward<C>&, int64_t, const std::vector<int64_t>&, int);   \
  template Plan plan_ridge_backward(const RidgeBackward<C>&, int64_t, const std::vector<int64_t>&, int); \
  template void launch_ridge_forward(const RidgeForward<C>&, int64_t, const Plan&, C*, const Stream&);   \
  template void launch_ridge_backward(const RidgeBackward<C>&, int64_t, const Plan&, C*, C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
