// Every barrier of a block, by where it stands in the sources, is needed: somewhere it alone keeps two
// accesses apart. What is not needed costs time on every task.
#pragma once

#include "tests/lane_kernels.h"
#include "tests/narrow_float.h"

namespace kernelmeta {
namespace {

// F: how the features are stored.
template <class F = float>
void meet_barriers(const Sizes& s, bool from_support, bool running, const Wanted& wanted = {},
                   double lr = 0.02, double along = 0) {
  const Episode e(s, from_support, running, lr, along);
  run<float, F>(kLaneKernels<float>, e, true, draw(s.T * s.Q * s.N), draw(s.T * s.N * s.D), wanted);
}

// Tasks whose barriers are not those of the tasks that results are compared on. (One barrier serves many
// passes of a loop; where a pass is seen to need it, all may have it.)
void meet_more_barriers() {
  //             T  S  Q   N  D   H  K
  meet_barriers({2, 5, 9, 3, 24, 6, 2}, true, false);
  meet_barriers({1, 3, 9, 3, 11, 6, 1}, false, true);
  meet_barriers({1, 3, 17, 2, 11, 5, 1}, true, false);  // no Gram matrix
  meet_barriers({1, 3, 9, 3, 11, 6, 1}, false, true, {false, false, false});
  meet_barriers({1, 4, 9, 3, 11, 6, 1}, true, false, {false, false, true});
  meet_barriers({1, 3, 9, 3, 11, 6, 0}, true, false);
  // Steps that cancel are done anew in D dimensions.
  meet_barriers({2, 5, 9, 3, 7, 6, 2}, true, false, {}, 0.5, 3);
  meet_barriers({1, 3, 9, 3, 5, 4, 2}, false, true, {}, 0.5, 3);
  meet_barriers({2, 3, 9, 2, 1, 4, 2}, true, false);
  meet_barriers({2, 3, 17, 2, 1, 4, 1}, true, false);
  for (const HeadCase& c : even_head_rows()) HeadEpisode(c).run<float>(kLaneTable);
  // Which tasks cancel depends on what was drawn.
  for (int draws = 0; draws < 16; ++draws) {
    for (const ProgramCase& c : program_cases()) {
      if (c.along) ProgramEpisode(c).run<float>(kLaneTable);
    }
  }
  // Networks with and without what may follow a barrier, of more units than a warp has lanes.
  for (const auto& widths :
       std::vector<std::vector<int64_t>>{{9, 3}, {9, 40, 3}, {9, 20, 40, 3}, {5, 6, 36, 7, 2}, {7, 9, 1}}) {
    for (int options = 0; options < 32; ++options) {
      const auto option = [options](int bit) { return (options >> bit & 1) != 0; };
      const NetworkCase c{2,         19,        11,        widths,   option(0), 0.0, option(1) ? 0 : 5,
                          option(2), option(3), option(4), option(3)};
      DescentEpisode(c).run<float>(kLaneTable);
      NtkEpisode(c).run<float>(kLaneTable);
    }
  }
  // More parameters than blocks can add up at once.
  NtkEpisode({1, 2, 1, {130, 256, 3}, true, 0.0, 0, false, false, false, false}).run<float>(kLaneTable);
  // Shares of many classes.
  for (const bool cosine : {false, true}) {
    for (const Oracle oracle : {Oracle::kProportions, Oracle::kAssignment, Oracle::kSoftAssignment}) {
      if (!cosine && oracle == Oracle::kSoftAssignment) continue;
      ProgramCase c{"shares", 21,           11,       0,
                    {0, 0},   {47, 47},     {11, 11}, {{oracle, true, true, 2, Shares::kGiven}},
                    cosine,   Start::kGiven};
      for (const int64_t bags : {1, 2}) {
        c.bags = bags;
        ProgramEpisode(c).run<float>(kLaneTable);
      }
    }
  }
  // Rows of 16 bits: in one tile, whose features all warps share out, and in three.
  meet_barriers<BrainFloat>({1, 3, 9, 3, 72, 6, 1}, true, true);
  meet_barriers<BrainFloat>({1, 3, 33, 2, 72, 6, 3}, true, true);
}

// After everything that is to meet barriers.
int check_barriers() {
  int needless = 0, of_blocks = 0;
  for (const auto& [place, barrier] : lanes::barriers) {
    if (!barrier.of_block) continue;
    ++of_blocks;
    if (barrier.needed) continue;
    ++needless;
    std::printf("FAILED: nothing was seen to need the barrier at %s, met %ld times\n", place.c_str(),
                barrier.met);
  }
  std::printf("%d places with barriers, %d of them needless\n", of_blocks, needless);
  return needless != 0;
}

}  // namespace
}  // namespace kernelmeta
