// `program` on a GPU; the kernels are in program_forward.cu and program_backward.cu.
#pragma once

#include "cuda/device.h"
#include "ops/program.h"

namespace kernelmeta::cuda {

template <class C>
class Kernel<ProgramArguments<C>> {
 public:
  Kernel(const Device& device, const ProgramArguments<C>& a)
      : device_(device), host_(a.on_host()), tasks_(tasks_of_each_size(a.support, a.query, a.labels)) {
    constexpr size_t kMost = ProgramDeviceCall<C>::kMostPhases;
    if (a.phases.size() > kMost) {
      refuse("phases: expected at most " + std::to_string(kMost) + " on a GPU, got " +
             std::to_string(a.phases.size()));
    }
    for (const Phase& phase : a.phases) {
      if (phase.wants_joint_steps())
        refuse("phases: joint steps and their entropies have no kernel on a GPU");
    }
    if (host_.euclidean) refuse("classifier: a Euclidean one has no kernel on a GPU");
    if (host_.dot) refuse("classifier: a dot product has no kernel on a GPU");
    std::copy(a.phases.begin(), a.phases.end(), call_.phases);
    call_.sizes = a.mlp_sizes();
    call_.mlp = a.mlp.arrays();
    call_.running = a.mlp.running();
    for (const int64_t t : tasks_) {
      call_.stride = std::max(call_.stride, program_trace_size(host_, host_.shape(t, a.phases.data())));
    }
  }

  int64_t trace_elements() const { return host_.T * call_.stride; }

  void forward(const ProgramForward<C>& run) const {
    ProgramForward<C> on_host = run;
    on_host.problem = host_;
    const Plan plan = plan_program_forward<C>(on_host, call_, tasks_, device_.on().index);
    const Scratch<C> memory(device_, plan);
    launch_program_forward<C>(run, call_, plan, memory, device_.stream());
  }

  void backward(const ProgramBackward<C>& run, const Sums<C, ProgramGrad<C>>& sums) const {
    ProgramBackward<C> on_host = run;
    on_host.problem = host_;
    const Plan plan = plan_program_backward<C>(on_host, call_, tasks_, device_.on().index);
    const Scratch<C> memory(device_, plan);
    const BlockSums<C> partials(device_, plan, sums.size());
    launch_program_backward<C>(run, call_, plan, memory, partials, device_.stream());
    partials.finish(sums);
  }

 private:
  const Device& device_;
  ProgramProblem<C> host_;
  std::vector<int64_t> tasks_;  // one of each size, or of the largest
  ProgramDeviceCall<C> call_{};
};

}  // namespace kernelmeta::cuda
