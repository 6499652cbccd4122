#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    class_means_fwd_kernel(const __grid_constant__ ClassMeansProblem<C> p, C* theta0, Memory<C> memory) {
  class_means_forward_body<B>(block_memory<B, ClassMeansLayout<B>>(), p, theta0, memory.template arena<B>(),
                              block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    class_means_bwd_kernel(const __grid_constant__ ClassMeansProblem<C> p, const C* grad_theta0,
                           C* grad_support, C* partials, Memory<C> memory) {
  class_means_backward_body<B>(block_memory<B, ClassMeansLayout<B>>(), p, grad_theta0, grad_support,
                               partials + blockIdx.x * p.s.D, memory.template arena<B>(), block_tasks());
}

template <class C, class Fn>
auto with_class_means_block(const ClassMeansProblem<C>& p, Fn f) {
  return with_storage<C>(p.support.storage, [&](auto feature) {
    return f(Type<CudaBlock<C, typename decltype(feature)::type>>{});
  });
}

}  // namespace

template <class C>
Plan plan_class_means(const ClassMeansProblem<C>& p, bool backward, int device) {
  return with_class_means_block(p, [&](auto block) {
    using B = typename decltype(block)::type;
    const void* kernel = backward ? reinterpret_cast<const void*>(&class_means_bwd_kernel<B>)
                                  : reinterpret_cast<const void*>(&class_means_fwd_kernel<B>);
    return make_plan<B, ClassMeansLayout<B>>(kernel, p.s, device, backward);
  });
}

template <class C>
void launch_class_means_forward(const ClassMeansProblem<C>& p, C* theta0, const Plan& plan, C* workspace,
                                const Stream& stream) {
  with_class_means_block(p, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("class_means", &class_means_fwd_kernel<B>, plan, stream, p, theta0,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_class_means_backward(const ClassMeansProblem<C>& p, const C* grad_theta0, C* grad_support,
                                 const Plan& plan, C* workspace, C* partials, const Stream& stream) {
  with_class_means_block(p, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("class_means_backward", &class_means_bwd_kernel<B>, plan, stream, p, grad_theta0, grad_support,
              partials, Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                                       \
  template Plan plan_class_means(const ClassMeansProblem<C>&, bool, int);                                    \
  template void launch_class_means_forward(const ClassMeansProblem<C>&, C*, const Plan&, C*, const Stream&); \
  template void launch_class_means_backward(const ClassMeansProblem<C>&, const C*, C*, const Plan&, C*, C*,  \
                                            const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
