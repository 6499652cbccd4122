#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    sib_fwd_kernel(const __grid_constant__ SibForward<C> f, int64_t stride, Memory<C> memory) {
  sib_forward_body<B>(block_memory<B, SibForwardLayout<B>>(), f, stride, memory.template arena<B>(),
                      block_tasks());
}

}  // namespace

template <class C>
Plan plan_sib_forward(const SibForward<C>& f, int device) {
  return with_block<C>(f.problem.s, f.problem.query.storage, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, SibForwardLayout<B>>(reinterpret_cast<const void*>(&sib_fwd_kernel<B>), f.problem.s,
                                             device, f, C(0), C(0));
  });
}

template <class C>
void launch_sib_forward(const SibForward<C>& f, const Plan& plan, C* workspace, const Stream& stream) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  with_block<C>(f.problem.s, f.problem.query.storage, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("sib", &sib_fwd_kernel<B>, plan, stream, f, stride,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template Plan plan_sib_forward(const SibForward<float>&, int);
template Plan plan_sib_forward(const SibForward<double>&, int);
template void launch_sib_forward(const SibForward<float>&, const Plan&, float*, const Stream&);
template void launch_sib_forward(const SibForward<double>&, const Plan&, double*, const Stream&);

}  // namespace kernelmeta::cuda
