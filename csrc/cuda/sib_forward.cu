#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads, 2)
    sib_fwd_kernel(const __grid_constant__ SibForward<C> f, int64_t stride, Memory<C> memory) {
  sib_forward_body<B>(frame<B, SibForwardLayout<B>>(), f, stride, memory.template arena<B>(), share());
}

template <class C, class F, class Z>
using Block = TeamBlock<CudaTeam<256>, C, F, Z>;

template <class C, class Fn>
auto with_block(const SibForward<C>& f, Fn fn) {
  return with_storage<C>(f.problem.query.storage, [&](auto feature) {
    return with_sizes<C>(f.problem.s, [&](auto sizes) {
      return fn(Type<Block<C, typename decltype(feature)::type, typename decltype(sizes)::type>>{});
    });
  });
}

}  // namespace

template <class C>
Plan plan_sib_forward(const SibForward<C>& f, int device) {
  return with_block(f, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_plan<B, SibForwardLayout<B>>(reinterpret_cast<const void*>(&sib_fwd_kernel<B>), f.problem.s,
                                             device, f, C(0), C(0));
  });
}

template <class C>
void launch_sib_forward(const SibForward<C>& f, const Plan& plan, C* workspace, const Where& where) {
  const int64_t stride = trace_size<C>(f.problem.s, f.problem.weights);
  with_block(f, [&](auto block) {
    using B = typename decltype(block)::type;
    launch("sib", &sib_fwd_kernel<B>, B::kThreads, plan, where, f, stride,
           Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template Plan plan_sib_forward(const SibForward<float>&, int);
template Plan plan_sib_forward(const SibForward<double>&, int);
template void launch_sib_forward(const SibForward<float>&, const Plan&, float*, const Where&);
template void launch_sib_forward(const SibForward<double>&, const Plan&, double*, const Where&);

}  // namespace kernelmeta::cuda
