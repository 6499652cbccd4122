// What each kernel does for one task of the published sizes: barriers, words of warps, shared memory. Counted, not
// measured; a limit for each shows that a design became slower, without a GPU.
#pragma once

#include "tests/lane_kernels.h"

namespace kernelmeta {
namespace {

// Five ways, 75 query rows, 640 features. Adds what it counts to `all`, under the kernels' names and this precision.
template <class F>
void count_precision(const char* precision, std::vector<std::pair<std::string, lanes::Counts>>& all) {
  lanes::counts.clear();
  //          T  S  Q   N  D    H   K
  Episode sib({1, 5, 75, 5, 640, 40, 3}, true, false, 1e-3);
  sib.query = rounded<F>(sib.query);
  sib.start = rounded<F>(sib.start);
  run<float, F>(kLaneKernels<float>, sib, true, draw(75 * 5), draw(5 * 640));
  HeadEpisode head({{1, 25, 75, 5, 640, 0, 5}, Oracle::kCrossEntropy, false, true, true, true, false});
  ProgramEpisode program({.name = "published sizes",
                          .D = 640,
                          .N = 5,
                          .H = 40,
                          .S = {25},
                          .Q = {75},
                          .ways = {5},
                          .phases = {{Oracle::kCrossEntropy, false, true, 3}, {Oracle::kSyntheticGradient, true, false, 3}},
                          .cosine = true,
                          .start = Start::kClassMeans});
  RidgeEpisode ridge({640, 5, {25}, {75}, {5}, true, false, true, true});
  ClassMeansEpisode means({1, 25, 0, 5, 640, 0, 0}, true, true);
  DistillationEpisode rows({16, 1000, LogitDistance::kKl, 100, 2, 0, 3, false, true, false});
  DescentEpisode descent({1, 25, 75, {640, 64, 5}, true, 0.0, 5, false, true, true, false});
  NtkEpisode ntk({1, 25, 75, {640, 64, 5}, true, 0.0, 0, false, true, true, false});
  const auto count = [&](auto episode) {
    episode.template round_features<F>();
    episode.template run<float, F>(kLaneTable);
  };
  count(head);
  count(program);
  count(ridge);
  count(means);
  count(rows);
  count(descent);
  count(ntk);
  if (sizeof(F) == 4) MlpEpisode(Sizes{1, 0, 75, 5, 0, 40, 0}, false).run<float>(kLaneTable);
  for (const auto& [name, of_name] : lanes::counts) {
    if (name != "sum_partials") all.emplace_back(name + " " + precision, of_name);
  }
}

std::vector<std::pair<std::string, lanes::Counts>> count_published_sizes() {
  lanes::banks = true;
  lanes::device = {};
  std::vector<std::pair<std::string, lanes::Counts>> all;
  count_precision<float>("float32", all);
  count_precision<BrainFloat>("bfloat16", all);
  lanes::banks = false;
  return all;
}

int check_counts(bool as_json) {
  const auto all = count_published_sizes();
  if (!as_json) std::printf("| kernel | barriers | __syncwarp | shuffles | mma | copies | shared bytes | loads and stores | wavefronts | least |\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (const auto& [name, c] : all) {
    const long blocks = c.blocks;
    std::printf("| `%s` | %ld | %ld | %ld | %ld | %ld | %ld | %ld | %ld | %ld |\n", name.c_str(),
                (c.block_barriers + c.votes) / blocks, c.warp_barriers / blocks, c.shuffles / blocks, c.products / blocks, c.copies / blocks,
                c.shared_bytes, (c.shared_loads + c.shared_stores) / blocks, c.wavefronts / blocks, c.least_wavefronts / blocks);
  }
  return 0;
}

}  // namespace
}  // namespace kernelmeta
