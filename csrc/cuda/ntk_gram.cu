#include "cuda/kernel.cuh"
#include "cuda/ntk_bodies.h"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    ntk_gram_fwd_kernel(const __grid_constant__ NtkForward<C> f, int64_t stride, Memory<C> memory) {
  ntk_forward_body<B>(block_memory<B, NtkForwardLayout<B>>(), f, stride, memory.template arena<B>(),
                      block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    ntk_gram_bwd_kernel(const __grid_constant__ NtkBackward<C> f, int64_t stride, C* partials, int64_t size,
                        Memory<C> memory) {
  ntk_backward_body<B>(block_memory<B, NtkBackwardLayout<B>>(), f, stride, partials + blockIdx.x * size, size,
                       memory.template arena<B>(), block_tasks());
}

// f(Type of the Block)
template <class C, class Fn>
auto with_network_block(const NtkProblem<C>& p, Fn f) {
  return with_storage<C>(p.support.storage, [&](auto feature) {
    return f(Type<CudaBlock<C, typename decltype(feature)::type>>{});
  });
}

}  // namespace

template <class C>
Plan plan_ntk_gram_forward(const NtkForward<C>& f, int device) {
  return with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, NtkForwardLayout<B>>(reinterpret_cast<const void*>(&ntk_gram_fwd_kernel<B>),
                                             f.problem.sizes(), device, f);
  });
}

template <class C>
Plan plan_ntk_gram_backward(const NtkBackward<C>& f, int device) {
  return with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, NtkBackwardLayout<B>>(reinterpret_cast<const void*>(&ntk_gram_bwd_kernel<B>),
                                              f.problem.sizes(), device, f);
  });
}

template <class C>
void launch_ntk_gram_forward(const NtkForward<C>& f, const Plan& plan, C* workspace, const Stream& stream) {
  with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("ntk_gram", &ntk_gram_fwd_kernel<B>, plan, stream, f, ntk_trace_size<C>(f.problem),
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_ntk_gram_backward(const NtkBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                              const Stream& stream) {
  with_network_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("ntk_gram_backward", &ntk_gram_bwd_kernel<B>, plan, stream, f, ntk_trace_size<C>(f.problem),
              partials, size_of<NtkGrad<C>, C>(f.problem.net),
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                         \
  template Plan plan_ntk_gram_forward(const NtkForward<C>&, int);                              \
  template Plan plan_ntk_gram_backward(const NtkBackward<C>&, int);                            \
  template void launch_ntk_gram_forward(const NtkForward<C>&, const Plan&, C*, const Stream&); \
  template void launch_ntk_gram_backward(const NtkBackward<C>&, const Plan&, C*, C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
