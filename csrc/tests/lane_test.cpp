// The CUDA kernels' own sources, compiled as C++ and executed lane by lane: right results, no race, nothing
// read or written that is not the kernel's. See lanes/machine.h.
//
//   lane_test                 every kernel, in every precision, with much and with little shared memory
//   lane_test rare            ... with other amounts of it, in other orders of the lanes
//   lane_test controls        what is wrong on purpose is seen
//   lane_test counts [table]  what each kernel does for a task of the published sizes; not more than the
//                             table says
#include <cstdio>

#include "cpu/dispatch.h"
#include "tests/dot_checks.h"
#include "tests/lane_barriers.h"
#include "tests/lane_controls.h"
#include "tests/lane_counts.h"
#include "tests/lane_kernels.h"
#include "tests/size_checks.h"

using namespace kernelmeta;

namespace {

int report_faults() {
  for (const auto& [what, times] : lanes::faults) std::printf("FAILED: %s, %ld times\n", what.c_str(), times);
  return !lanes::faults.empty();
}

template <class F>
void check_narrow_parts(const std::string& name) {
  for_each_part([&](const auto& episode, auto stores_features) {
    if constexpr (stores_features.value) compare_narrow<F>(name, episode, kernel_table(), kLaneTable);
  });
}

void check_unfold(const std::string& name) {
  const Sizes s{1, 0, 11, 3, 0, 5, 0};
  const MlpEpisode e(s, false);
  const Vec folded = draw_floats(size_of<FoldedMlpGrad<double>, double>(s));
  std::vector<Vec> want, got;
  for (const Vec& v : e.tensors) want.emplace_back(v.size());
  got = want;
  const auto arrays_of = [](auto& p, auto pointer) {
    using P = decltype(pointer);
    using X = std::remove_pointer_t<P>;
    return MlpArrays<X>{p[0].data(), p[1].data(), p[2].data(), p[3].data(), p[4].data(),
                        p[5].data(), p[6].data(), p[7].data(), p[8].data(), p[9].data()};
  };
  const auto arrays = arrays_of(e.tensors, static_cast<const double*>(nullptr));
  Vec sums = folded, sums_on_lanes = folded;
  Arena<double> arena(sums.data());
  SerialBlock<double> serial;
  unfold(serial, arrays, FoldedMlpGrad<double>(arena, s), s, arrays_of(want, static_cast<double*>(nullptr)));
  lanes::count_as("unfold");
  cuda::launch_unfold<double>(s, arrays, sums_on_lanes.data(), arrays_of(got, static_cast<double*>(nullptr)),
                              lane_stream);
  for (size_t i = 0; i < want.size(); ++i) expect_near(name + " unfold", got[i], want[i], 1e-12);
}

// In this much shared memory. The order of the lanes goes on from one to the next.
int check_precisions(int shared_bytes) {
  lanes::device.shared_bytes = shared_bytes;
  const std::string name = std::to_string(shared_bytes) + " bytes of shared memory:";
  generator.seed(0);  // what central differences cannot resolve in one draw, they can in another
  int status = check_all(name, kLaneKernels<double>, kLaneKernels<float>, true);
  // An even number of features: words on rows share them out among threads in two ways.
  //                                                            T  S  Q   N  D   H  K
  check(name, kLaneKernels<double>, kLaneKernels<float>, true, {1, 7, 12, 3, 20, 6, 2}, true, false);
  check(name, kLaneKernels<double>, kLaneKernels<float>, true, {1, 7, 12, 3, 20, 6, 2}, true, false, 0.5, 3);
  status |= check_learners(name, kernel_table(), kLaneTable);
  status |= check_sizes(name, kLaneTable);
  for_each_part(
      [&](const auto& episode, auto) { compare_episode(name, episode, kernel_table(), kLaneTable); });
  check_unfold(name);
  return status | (failures != 0);
}

template <class F>
int check_precision_of_16_bits(const std::string& name) {
  int status = check_narrow<F>(name, kLaneKernels<double>, kLaneKernels<float>, kLaneKernels<float>) |
               check_narrow_learners<F>(name, kernel_table(), kLaneTable);
  check_narrow_parts<F>(name);
  return status | (failures != 0);
}

// Shared memory of an H100, and so little that most of a task lies in global memory.
constexpr int kMuch = 232448, kLittle = 57344, kLeast = 45056;

int check_kernels() {
  int status = check_precisions(kMuch) | check_precisions(kLittle);
  lanes::device.shared_bytes = kMuch;
  status |=
      check_precision_of_16_bits<BrainFloat>("bfloat16:") | check_precision_of_16_bits<Half>("float16:");
  check_dots<float>("float32:");
  check_dots<BrainFloat>("bfloat16:");
  check_dots<Half>("float16:");
  check_dot_extremes();
  return status | (failures != 0);
}

// Other amounts of shared memory, for features of 16 bits too, the published sizes, and other orders.
int check_rarely() {
  int status = 0;
  for (const int bytes : {kLeast, 101376, 166912}) {
    status |= check_precisions(bytes) | check_precision_of_16_bits<BrainFloat>("bfloat16:") |
              check_precision_of_16_bits<Half>("float16:");
  }
  lanes::device.shared_bytes = kMuch;
  for (const int order : {2, 3}) {
    lanes::seed(uint64_t(order));
    status |= check_kernels();
  }
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "controls") return check_controls();
  if (what == "counts") return check_counts(argc > 2 ? argv[2] : "") | report_faults();
  if (what == "conflicts") return print_conflicts();
  int status = what == "rare" ? check_rarely() : check_kernels();
  meet_more_barriers();
  status |= check_barriers();
  return report_faults() | status;
}
