#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    linear_head_fwd_kernel(const __grid_constant__ HeadForward<C> f, int64_t stride, Memory<C> memory) {
  head_forward_body<B>(block_memory<B, HeadForwardLayout<B>>(), f, stride, memory.template arena<B>(),
                       block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    linear_head_bwd_kernel(const __grid_constant__ HeadBackward<C> f, int64_t stride, int64_t size,
                           C* partials, Memory<C> memory) {
  head_backward_body<B>(block_memory<B, HeadBackwardLayout<B>>(), f, stride, partials + blockIdx.x * size,
                        memory.template arena<B>(), block_tasks());
}

// f(Type of the Block)
template <class C, class Fn>
auto with_head_block(const HeadProblem<C>& p, Fn f) {
  return with_storage<C>(p.support.storage, [&](auto feature) {
    return f(Type<CudaBlock<C, typename decltype(feature)::type>>{});
  });
}

}  // namespace

template <class C>
Plan plan_linear_head_forward(const HeadForward<C>& f, int device) {
  return with_head_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, HeadForwardLayout<B>>(reinterpret_cast<const void*>(&linear_head_fwd_kernel<B>),
                                              f.problem.s, device, f);
  });
}

template <class C>
Plan plan_linear_head_backward(const HeadBackward<C>& f, int device) {
  return with_head_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, HeadBackwardLayout<B>>(reinterpret_cast<const void*>(&linear_head_bwd_kernel<B>),
                                               f.problem.s, device, f);
  });
}

template <class C>
void launch_linear_head_forward(const HeadForward<C>& f, const Plan& plan, C* workspace,
                                const Stream& stream) {
  with_head_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("linear_head", &linear_head_fwd_kernel<B>, plan, stream, f, head_trace_size<C>(f.problem.s),
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_linear_head_backward(const HeadBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                                 const Stream& stream) {
  with_head_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("linear_head_backward", &linear_head_bwd_kernel<B>, plan, stream, f,
              head_trace_size<C>(f.problem.s), size_of<HeadParameterGrad<C>, C>(f.problem.s), partials,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                             \
  template Plan plan_linear_head_forward(const HeadForward<C>&, int);                              \
  template Plan plan_linear_head_backward(const HeadBackward<C>&, int);                            \
  template void launch_linear_head_forward(const HeadForward<C>&, const Plan&, C*, const Stream&); \
  template void launch_linear_head_backward(const HeadBackward<C>&, const Plan&, C*, C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
