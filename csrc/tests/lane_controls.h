// What is wrong on purpose, and must be seen: in kernels of their own, and in the project's kernels.
#pragma once

#include "cuda/kernel.cuh"
#include "tests/lane_kernels.h"

namespace kernelmeta {
namespace {

using ControlTeam = CudaTeam<64>;
using ControlBlock = TeamBlock<ControlTeam, float, float, Sizes>;

// Each lane of a warp reads what its neighbour stored.
void warp_barrier_kernel(float* out, bool parted) {
  float* const shared = ControlTeam::stage<float>();
  const int lane = ControlTeam::thread();
  shared[lane] = float(lane);
  if (parted) ControlTeam::sync_warp();
  out[lane] = ControlTeam::swap_lanes(shared[lane ^ 1], 1);
}
// Each warp reads what the other one stored; a barrier of the warp is not enough.
void block_barrier_kernel(float* out, bool parted) {
  float* const shared = ControlTeam::stage<float>();
  const int lane = ControlTeam::thread();
  shared[lane] = float(lane);
  if (parted)
    ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
  else
    ControlTeam::sync_warp();
  out[lane] = shared[lane ^ 32];
}
// One lane loads, another stores what was loaded.
void store_after_load_kernel(float* out, bool parted) {
  float* const shared = ControlTeam::stage<float>();
  const int lane = ControlTeam::thread();
  shared[lane] = float(lane);
  ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
  out[lane] = shared[lane ^ 32];
  if (parted) ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
  shared[lane] = 0;
}
// Rows whose padding is cleared, or not, in a product that reads it.
void padding_kernel(float* out, bool cleared) {
  const ControlBlock block;
  constexpr int kRows = 3, kEntries = 5;
  const int64_t ld = padded(kEntries);
  float* const rows = ControlTeam::stage<float>();
  if (cleared)
    block.columns(kEntries, [&](auto q) {
      for (int i = 0; i < kRows; ++i) q.store(rows + i * ld, 1);
    });
  else
    block.each_item(kRows * kEntries, [&](int64_t e) { rows[e / kEntries * ld + e % kEntries] = 1; });
  block.outer(kRows, kRows, kEntries, rows, ld, rows, ld, out, kRows);
}
// One element more than there is shared memory for, loaded or stored.
void overrun_kernel(float* out, bool fits, int64_t elements) {
  float* const shared = ControlTeam::stage<float>();
  if (ControlTeam::thread() == 0) shared[fits ? elements - 1 : elements] = 1;
  out[ControlTeam::thread()] = 0;
}
// All lanes store into one array.
void outside_kernel(float* out, bool fits) {
  const int lane = ControlTeam::thread();
  out[fits ? lane : lane + 1] = 0;
}
// The next lane's local memory.
void local_memory_kernel(float* out, bool own) {
  float local[64] = {1};  // (so many that the first is not taken for a parameter)
  float** const shared = ControlTeam::stage<float*>();
  const int lane = ControlTeam::thread();
  shared[lane] = local;
  ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
  out[lane] = *shared[own ? lane : lane ^ 1];
  ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
}
// Blocks that store into one place.
void blocks_kernel(float* out, bool apart) {
  if (ControlTeam::thread() == 0) out[apart ? int(blockIdx.x) : 0] = 1;
}
// Asynchronous copies that are waited for, or not.
void copies_kernel(const float* from, float* out, bool awaited) {
  float* const shared = ControlTeam::stage<float>();
  const int lane = ControlTeam::thread();
  ControlTeam::copy_pack(from + lane * 4, shared + lane * 4);
  ControlTeam::end_copies();
  if (awaited) {
    ControlTeam::end_copies();
    ControlTeam::await_copies();
  }
  ControlTeam::sync({__builtin_FILE(), __builtin_LINE()});
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = shared[(lane ^ 32) * 4 + i];
}

// Whether faults of this kind were seen; forgets all.
bool seen(const std::string& kind) {
  bool found = false;
  for (const auto& [what, times] : lanes::faults) found = found || what.find(kind) != std::string::npos;
  lanes::faults.clear();
  return found;
}

void expect_seen(const std::string& what, bool holds) {
  std::printf("%s %s\n", holds ? "seen:" : "FAILED, not seen:", what.c_str());
  failures += !holds;
}

// run(right): first as it should be, then not.
template <class Run>
void control(const char* what, const char* kind, Run run) {
  run(true);
  if (!lanes::faults.empty()) expect_seen(std::string(what) + ": nothing is wrong", false);
  lanes::faults.clear();
  run(false);
  expect_seen(what, seen(kind));
}

void check_control_kernels() {
  constexpr int64_t kElements = 64;
  const auto plan_of = [](int64_t blocks, int64_t bytes) {
    cuda::Plan plan;
    plan.blocks = blocks;
    plan.shared_bytes = bytes;
    return plan;
  };
  LaneMemory<float> from(4 * kElements);
  std::vector<float> out(kElements), four(4 * kElements);
  const auto simple = [&](auto kernel, int64_t blocks = 1) {
    return [&out, kernel, blocks, plan_of](bool right) {
      cuda::launch<ControlBlock>("control", kernel, plan_of(blocks, kElements * 8), lane_stream, out.data(),
                                 right);
    };
  };
  control("a missing __syncwarp", "a race", simple(&warp_barrier_kernel));
  control("a missing __syncthreads", "a race", simple(&block_barrier_kernel));
  control("a missing __syncthreads before a store", "a race", simple(&store_after_load_kernel));
  control("a store beyond an array", "outside of any array", simple(&outside_kernel));
  control("a store that two blocks do", "a race", simple(&blocks_kernel, 2));
  control("a load of another lane's local memory", "memory of another lane", simple(&local_memory_kernel));
  control("a store beyond shared memory", "beyond the block's shared memory", [&](bool right) {
    cuda::launch<ControlBlock>("control", &overrun_kernel, plan_of(1, kElements * 4), lane_stream, out.data(),
                               right, kElements);
  });
  control("an asynchronous copy that is not waited for", "a load of what is still being copied",
          [&](bool right) {
            cuda::launch<ControlBlock>("control", &copies_kernel, plan_of(1, kElements * 16), lane_stream,
                                       static_cast<const float*>(from), four.data(), right);
          });
  for (const bool cleared : {true, false}) {
    std::vector<float> sums(9);
    cuda::launch<ControlBlock>("control", &padding_kernel, plan_of(1, 48 * 4), lane_stream, sums.data(),
                               cleared);
    bool all_right = true, all_nan = true;
    for (const float x : sums) all_right = all_right && x == 5, all_nan = all_nan && std::isnan(x);
    expect_seen(cleared ? "padding that was cleared" : "a read of padding that was not",
                (cleared ? all_right : all_nan) && lanes::faults.empty());
  }
}

// The project's kernels, on a machine where something is missing.
void check_sabotage() {
  const HeadEpisode head(head_cases()[0]);
  const RidgeEpisode ridge(ridge_cases()[0]);
  const ProgramEpisode program(program_cases()[0]);
  const MlpEpisode mlp(Sizes{3, 0, 11, 3, 0, 5, 0}, false);
  DescentEpisode descent(network_cases()[0]);
  NtkEpisode ntk(network_cases()[0]);
  const Episode sib({2, 7, 11, 3, 13, 5, 2}, true, false, 0.02);
  const Vec weights_z = draw(2 * 11 * 3), weights_theta = draw(2 * 3 * 13);
  // warps: among kernels whose warps need barriers alone.
  const auto every = [&](const std::string& what, const char* kind, bool warps = false) {
    const auto one = [&](const std::string& kernel, auto call) {
      call();
      expect_seen(what + ", " + kernel, seen(kind));
    };
    one("sib", [&] { run<float>(kLaneKernels<float>, sib, true, weights_z, weights_theta); });
    const auto of_episode = [&](const auto& episode) {
      one(episode.text(), [&] { episode.template run<float>(kLaneTable); });
    };
    of_episode(ridge);
    of_episode(program);
    if (warps) return;
    of_episode(head);
    of_episode(mlp);
    of_episode(descent);
    of_episode(ntk);
  };
  lanes::sabotage.no_warp_barriers = true;
  every("no __syncwarp", "a race", true);
  lanes::sabotage = {};
  lanes::sabotage.no_block_barriers = true;
  every("no __syncthreads", "a race");
  lanes::sabotage = {};
  lanes::sabotage.fewer_bytes = 1024;
  every("1,024 bytes of shared memory less", "beyond the block's shared memory");
  lanes::sabotage = {};
  lanes::sabotage.no_waits_for_copies = true;
  HeadEpisode wide({{1, 4, 9, 2, 64, 0, 1}, Oracle::kCrossEntropy, false, true, true, true, false});
  wide.run<float>(kLaneTable);
  expect_seen("no waits for copies", seen("what is still being copied"));
  lanes::sabotage = {};

  // First float32, whose parts in TF32 are multiplied, then features of 16 bits.
  const auto wrong_fragments = [&]<class F>(const std::string& what, F) {
    const Named right = wide.run<float, F>(kLaneTable);
    lanes::sabotage.fragments = true;
    const Named wrong = wide.run<float, F>(kLaneTable);
    lanes::sabotage = {};
    bool differs = false;
    for (size_t i = 0; i < right.size(); ++i) {
      differs = differs || largest_error(wrong[i].second, right[i].second) > 0.01;
    }
    expect_seen("a wrong fragment index, " + what, differs && lanes::faults.empty());
  };
  wrong_fragments("float32", float());
  wide.round_features<BrainFloat>();
  wrong_fragments("bfloat16", BrainFloat());
}

int check_controls() {
  check_control_kernels();
  check_sabotage();
  return failures != 0;
}

}  // namespace
}  // namespace kernelmeta
