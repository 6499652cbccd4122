#include "cpu/dispatch.h"
#include "tests/lane_kernels.h"
#include "tests/size_checks.h"
#include <chrono>
#include <cstdio>

using namespace kernelmeta;

namespace {
int report_faults() {
  long all = 0;
  for (const auto& [what, times] : lanes::faults) {
    std::printf("FAILED: %s, %ld times\n", what.c_str(), times);
    all += times;
  }
  return all != 0;
}
double seconds() {
  static const auto begun = std::chrono::steady_clock::now();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}
}  // namespace

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  seconds();
  int status = 0;
  for (const int bytes : {232448, 49152 + 8192}) {
    lanes::device.shared_bytes = bytes;
    const std::string name = "shared memory of " + std::to_string(bytes) + " bytes:";
    status |= check_all(name, kLaneKernels<double>, kLaneKernels<float>, true);
    std::printf("%.1f s\n", seconds());
    status |= check_learners(name, kernel_table(), kLaneTable);
    std::printf("%.1f s\n", seconds());
    status |= check_sizes(name, kLaneTable);
    std::printf("%.1f s\n", seconds());
  }
  lanes::device.shared_bytes = 232448;
  status |= check_narrow<BrainFloat>("bfloat16:", kLaneKernels<double>, kLaneKernels<float>, kLaneKernels<float>);
  status |= check_narrow<Half>("float16:", kLaneKernels<double>, kLaneKernels<float>, kLaneKernels<float>);
    std::printf("%.1f s\n", seconds());
  status |= check_narrow_learners<BrainFloat>("bfloat16:", kernel_table(), kLaneTable);
  status |= check_narrow_learners<Half>("float16:", kernel_table(), kLaneTable);
    std::printf("%.1f s\n", seconds());
  for (const auto& [place, barrier] : lanes::barriers) {
    if (!barrier.needed) std::printf("%s: nothing needs its barrier (met %ld times)\n", place.c_str(), barrier.met);
  }
  return status | report_faults();
}
