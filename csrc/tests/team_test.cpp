// The bodies of the CUDA kernels on teams of host threads: right results for all sizes and options, with all,
// some and none of a block's memory in "shared" memory; and for features of 16 bits. Built with
// AddressSanitizer and UndefinedBehaviorSanitizer, and a second time with ThreadSanitizer.
#include "cpu/dispatch.h"
#include "tests/learner_checks.h"
#include "tests/narrow_float.h"
#include "tests/size_checks.h"
#include "tests/team_kernels.h"

using namespace kernelmeta;

int main() {
  int status = 0;
  const int64_t capacities[] = {INT64_MAX, 1500, 0};
  for (int64_t i = 0; i < 3; ++i) {
    team_options.capacity = capacities[i];
    team_options.blocks = 1 + i % 2;
    const std::string name = "shared memory for " + std::to_string(capacities[i]) + ":";
    status |= check_all(name, kTeamKernels<double>, kTeamKernels<float>, true);
    status |= check_learners(name, kernel_table(), kTeamTable<float>);
    status |= check_sizes(name, kTeamTable<float>);
  }
  team_options = {};
  status |= check_narrow<BrainFloat>("bfloat16:", kTeamKernels<double>, kTeamKernels<float, BrainFloat>,
                                     kTeamKernels<float>);
  status |=
      check_narrow<Half>("float16:", kTeamKernels<double>, kTeamKernels<float, Half>, kTeamKernels<float>);
  status |= check_narrow_learners<BrainFloat>("bfloat16:", kernel_table(), kTeamTable<BrainFloat>);
  status |= check_narrow_learners<Half>("float16:", kernel_table(), kTeamTable<Half>);
  return status;
}
