// What a program's kernels take beside tensors.
#pragma once

#include "engine/program_task.h"

namespace kernelmeta {

// Part of the kernels' parameters: nothing is copied to the device.
template <class C>
struct ProgramDeviceCall {
  static constexpr int kMostPhases = 64;

  Phase phases[kMostPhases];
  Sizes sizes;  // of the MLP
  MlpArrays<const C> mlp;
  const C* running;  // [2][2][H] or null
  int64_t stride;    // from one task's trace to the next one's
};

}  // namespace kernelmeta
