#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    sib_bwd_kernel(const __grid_constant__ SibBackward<C> f, int64_t stride, C* partials, Memory<C> memory) {
  sib_backward_body<B>(
      block_memory<B, SibBackwardLayout<B>>(), f, stride,
      partials + blockIdx.x * SibBackwardLayout<B>::sums_size(as<typename B::Sizes>(f.problem.s)),
      memory.template arena<B>(), block_tasks());
}

}  // namespace

template <class C>
Plan plan_sib_backward(const SibBackward<C>& f, int device) {
  return with_block<C>(f.problem.s, f.problem.query.storage, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, SibBackwardLayout<B>>(reinterpret_cast<const void*>(&sib_bwd_kernel<B>), f.problem.s,
                                              device, f, C(0), C(0));
  });
}

template <class C>
void launch_sib_backward(const SibBackward<C>& f, const Plan& plan, C* workspace, C* partials,
                         const Stream& stream) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  with_block<C>(f.problem.s, f.problem.query.storage, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("sib_backward", &sib_bwd_kernel<B>, plan, stream, f, stride, partials,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template Plan plan_sib_backward(const SibBackward<float>&, int);
template Plan plan_sib_backward(const SibBackward<double>&, int);
template void launch_sib_backward(const SibBackward<float>&, const Plan&, float*, float*, const Stream&);
template void launch_sib_backward(const SibBackward<double>&, const Plan&, double*, double*, const Stream&);

}  // namespace kernelmeta::cuda
