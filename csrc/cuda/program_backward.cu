#include "cuda/program.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    program_bwd_kernel(const __grid_constant__ ProgramBackward<C> f,
                       const __grid_constant__ ProgramDeviceCall<C> call, C* partials, int64_t size,
                       Memory<C> memory) {
  program_backward_body<B>(block_memory<B, ProgramBackwardLayout<B>>(), f, call, partials + blockIdx.x * size,
                           size, memory.template arena<B>(), block_tasks());
}

}  // namespace

template <class C>
Plan plan_program_backward(const ProgramBackward<C>& f, const ProgramDeviceCall<C>& call,
                           const std::vector<int64_t>& tasks, int device) {
  return with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_task_plan<B, ProgramBackwardLayout<B>>(reinterpret_cast<const void*>(&program_bwd_kernel<B>),
                                                       f, tasks, call.sizes, device, call);
  });
}

template <class C>
void launch_program_backward(const ProgramBackward<C>& f, const ProgramDeviceCall<C>& call, const Plan& plan,
                             C* workspace, C* partials, const Stream& stream) {
  with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("program_backward", &program_bwd_kernel<B>, plan, stream, f, call, partials,
              size_of<ProgramGrad<C>, C>(f.problem), Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                                       \
  template Plan plan_program_backward(const ProgramBackward<C>&, const ProgramDeviceCall<C>&,                \
                                      const std::vector<int64_t>&, int);                                     \
  template void launch_program_backward(const ProgramBackward<C>&, const ProgramDeviceCall<C>&, const Plan&, \
                                        C*, C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
