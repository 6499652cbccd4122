#include "cuda/program.cuh"

namespace kernelmeta::cuda {

namespace {

template <class B, class C = typename B::Scalar>
__global__ void __launch_bounds__(B::kThreads)
    program_fwd_kernel(const __grid_constant__ ProgramForward<C> f,
                       const __grid_constant__ ProgramDeviceCall<C> call, Memory<C> memory) {
  program_forward_body<B>(block_memory<B, ProgramForwardLayout<B>>(), f, call, memory.template arena<B>(),
                          block_tasks());
}

}  // namespace

template <class C>
Plan plan_program_forward(const ProgramForward<C>& f, const ProgramDeviceCall<C>& call,
                          const std::vector<int64_t>& tasks, int device) {
  return with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    return make_task_plan<B, ProgramForwardLayout<B>>(reinterpret_cast<const void*>(&program_fwd_kernel<B>),
                                                      f, tasks, call.sizes, device, call);
  });
}

template <class C>
void launch_program_forward(const ProgramForward<C>& f, const ProgramDeviceCall<C>& call, const Plan& plan,
                            C* workspace, const Stream& stream) {
  with_task_block<C>(f.problem, [&](auto block) {
    using B = typename decltype(block)::type;
    launch<B>("program", &program_fwd_kernel<B>, plan, stream, f, call,
              Memory<C>{plan.capacity, workspace, plan.workspace});
  });
}

#define INSTANTIATE(C)                                                                                     \
  template Plan plan_program_forward(const ProgramForward<C>&, const ProgramDeviceCall<C>&,                \
                                     const std::vector<int64_t>&, int);                                    \
  template void launch_program_forward(const ProgramForward<C>&, const ProgramDeviceCall<C>&, const Plan&, \
                                       C*, const Stream&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace kernelmeta::cuda
