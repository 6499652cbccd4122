#include "cuda/kernel.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads, 2)
    focal_distillation_fwd_kernel(const __grid_constant__ DistillationForward<C> f, Memory<C> memory) {
  distillation_forward_body<B>(f, memory.template arena<B>(), block_tasks());
}

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads, 2)
    focal_distillation_bwd_kernel(const __grid_constant__ DistillationBackward<C> f, Memory<C> memory) {
  distillation_backward_body<B>(f, memory.template arena<B>(), block_tasks());
}

template <class C, class Fn>
auto with_logits_block(const DistillationProblem<C>& p, Fn f) {
  return with_storage<C>(p.now.storage, [&](auto feature) {
    return f(Type<TeamBlock<CudaTeam<256>, C, typename decltype(feature)::type, Sizes>>{});
  });
}

}  // namespace

template <class C>
Plan plan_focal_distillation(const DistillationProblem<C>& p, bool backward, int device) {
  return with_logits_block(p, [&](auto block) {
    using B = typename decltype(block)::type;
    const void* kernel = backward ? reinterpret_cast<const void*>(&focal_distillation_bwd_kernel<B>)
                                  : reinterpret_cast<const void*>(&focal_distillation_fwd_kernel<B>);
    return make_plan_of<B>(kernel, (p.R + B::kWarps - 1) / B::kWarps, device, [&](int64_t capacity) {
      Arena<C> count(nullptr, capacity, nullptr);
      B own;
      DistillationRows<B> unused(count, own, p, B::kWarps, backward);
      return Used{count.used(), count.rest_used()};
    });
  });
}

template <class C>
void launch_focal_distillation_forward(const DistillationForward<C>& f, const Plan& plan, C* workspace,
                                       const Stream& stream) {
  with_logits_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("focal_distillation", &focal_distillation_fwd_kernel<B>, plan, stream, f,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

template <class C>
void launch_focal_distillation_backward(const DistillationBackward<C>& f, const Plan& plan, C* workspace,
                                        const Stream& stream) {
  with_logits_block(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("focal_distillation_backward", &focal_distillation_bwd_kernel<B>, plan, stream, f,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                              \
  template Plan plan_focal_distillation(const DistillationProblem<C>&, bool, int);                  \
  template void launch_focal_distillation_forward(const DistillationForward<C>&, const Plan&, C*,   \
                                                  const Stream&);                                   \
  template void launch_focal_distillation_backward(const DistillationBackward<C>&, const Plan&, C*, \
                                                   const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
