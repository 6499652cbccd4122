#include "cuda/kernel.cuh"
#include "cuda/ntk_bodies.h"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    linearised_descent_fwd_kernel(const __grid_constant__ DescentForward<C> f, int64_t stride,
                                  Memory<C> memory) {
  descent_forward_body<B>(block_memory<B, DescentForwardLayout<B>>(), f, stride, memory.template arena<B>(),
                          block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    linearised_descent_bwd_kernel(const __grid_constant__ DescentBackward<C> f, int64_t stride, C* partials,
                                  int64_t size, Memory<C> memory) {
  descent_backward_body<B>(block_memory<B, DescentBackwardLayout<B>>(), f, stride,
                           partials + blockIdx.x * size, size, memory.template arena<B>(), block_tasks());
}

// f(Type of the Block)
template <class C, class Fn>
auto with_network_block(const DescentProblem<C>& p, Fn f) {
  return with_storage<C>(p.support.storage, [&](auto feature) {
    return f(Type<CudaBlock<C, typename decltype(feature)::type>>{});
  });
}

}  // namespace

template <class C>
Plan plan_linearised_descent_forward(const DescentForward<C>& f, int device) {
  return with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, DescentForwardLayout<B>>(
        reinterpret_cast<const void*>(&linearised_descent_fwd_kernel<B>), f.problem.sizes(), device, f);
  });
}

template <class C>
Plan plan_linearised_descent_backward(const DescentBackward<C>& f, int device) {
  return with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, DescentBackwardLayout<B>>(
        reinterpret_cast<const void*>(&linearised_descent_bwd_kernel<B>), f.problem.sizes(), device, f);
  });
}

template <class C>
void launch_linearised_descent_forward(const DescentForward<C>& f, const Plan& plan, C* workspace,
                                       const Stream& stream) {
  with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("linearised_descent", &linearised_descent_fwd_kernel<B>, plan, stream, f,
              descent_trace_size<C>(f.problem), Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_linearised_descent_backward(const DescentBackward<C>& f, const Plan& plan, C* workspace,
                                        C* partials, const Stream& stream) {
  with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("linearised_descent_backward", &linearised_descent_bwd_kernel<B>, plan, stream, f,
              descent_trace_size<C>(f.problem), partials, size_of<DescentGrad<C>, C>(f.problem.net),
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                                       \
  template Plan plan_linearised_descent_forward(const DescentForward<C>&, int);                              \
  template Plan plan_linearised_descent_backward(const DescentBackward<C>&, int);                            \
  template void launch_linearised_descent_forward(const DescentForward<C>&, const Plan&, C*, const Stream&); \
  template void launch_linearised_descent_backward(const DescentBackward<C>&, const Plan&, C*, C*,           \
                                                   const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
