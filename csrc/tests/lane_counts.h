// What each kernel does for one task of the published sizes: barriers, words of warps, shared memory.
// Counted, not measured: the table in docs/cuda.md, which is a limit too, so that a slower design shows
// without a GPU.
#pragma once

#include <algorithm>
#include <fstream>
#include <sstream>

#include "tests/lane_kernels.h"

namespace kernelmeta {
namespace {

// Five ways, 75 query rows, 640 features. Adds what it counts to `all`, under the kernels' names and this
// precision.
template <class F>
void count_precision(const char* precision, std::vector<std::pair<std::string, lanes::Counts>>& all) {
  lanes::counts.clear();
  //          T  S  Q   N  D    H   K
  Episode sib({1, 5, 75, 5, 640, 40, 3}, true, false, 1e-3);
  sib.query = rounded<F>(sib.query);
  sib.start = rounded<F>(sib.start);
  run<float, F>(kLaneKernels<float>, sib, true, draw(75 * 5), draw(5 * 640));
  HeadEpisode head({{1, 25, 75, 5, 640, 0, 5}, Oracle::kCrossEntropy, false, true, true, true, false});
  ProgramEpisode program(
      {.name = "published sizes",
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

// The places in the program where lanes are most in each other's way.
int print_conflicts() {
  count_published_sizes();
  std::vector<std::pair<long, uint32_t>> places;
  for (const auto& [at, c] : lanes::conflicts) places.emplace_back(c.wavefronts - c.least_wavefronts, at);
  std::sort(places.rbegin(), places.rend());
  for (size_t i = 0; i < places.size() && i < 20; ++i) {
    const lanes::Conflicts& c = lanes::conflicts[places[i].second];
    std::printf("0x%x: %ld times, %ld wavefronts, %ld without conflicts\n", places[i].second, c.times,
                c.wavefronts, c.least_wavefronts);
  }
  return 0;
}

struct Column {
  const char* name;
  long (*of)(const lanes::Counts&);
  double slack;  // what may be more than the table says: it depends on the compiler
};
constexpr Column kColumns[] = {
    {"barriers", [](const lanes::Counts& c) { return c.block_barriers + c.votes; }, 1},
    {"`__syncwarp`", [](const lanes::Counts& c) { return c.warp_barriers; }, 1},
    {"shuffles", [](const lanes::Counts& c) { return c.shuffles; }, 1},
    {"`mma`", [](const lanes::Counts& c) { return c.products; }, 1},
    {"`cp.async`", [](const lanes::Counts& c) { return c.copies / long(lanes::kWarp); }, 1},
    {"shared memory (bytes)", [](const lanes::Counts& c) { return c.shared_bytes; }, 1},
    {"loads and stores there", [](const lanes::Counts& c) { return c.shared_loads + c.shared_stores; }, 1.25},
    {"wavefronts", [](const lanes::Counts& c) { return c.wavefronts; }, 1.25},
    {"without bank conflicts", [](const lanes::Counts& c) { return c.least_wavefronts; }, 1.25},
};

// The row of this kernel in a table of Markdown, or nothing.
std::vector<long> limits_of(const std::string& kernel, const std::string& path) {
  std::ifstream file(path);
  std::vector<long> limits;
  const std::string begin = "| `" + kernel + "` |";
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(begin, 0) != 0) continue;
    std::istringstream cells(line.substr(begin.size()));
    for (std::string cell; std::getline(cells, cell, '|');) {
      cell.erase(std::remove(cell.begin(), cell.end(), ','), cell.end());
      limits.push_back(std::strtol(cell.c_str(), nullptr, 10));
    }
  }
  return limits;
}

// Prints a table, or holds what is counted against the one in the file.
int check_counts(const std::string& path) {
  const auto all = count_published_sizes();
  int failed = 0;
  std::string rule = "|---|";
  if (path.empty()) {
    std::printf("| kernel |");
    for (const Column& column : kColumns) std::printf(" %s |", column.name), rule += "---|";
    std::printf("\n%s\n", rule.c_str());
  }
  for (const auto& [kernel, counts] : all) {
    const std::vector<long> limits = path.empty() ? std::vector<long>{} : limits_of(kernel, path);
    if (path.empty()) std::printf("| `%s` |", kernel.c_str());
    if (!path.empty() && limits.size() != std::size(kColumns)) {
      std::printf("FAILED: %s is not in the table of %s\n", kernel.c_str(), path.c_str());
      ++failed;
      continue;
    }
    for (size_t i = 0; i < std::size(kColumns); ++i) {
      const long count = kColumns[i].of(counts);
      if (path.empty()) {
        std::printf(" %ld |", count);
      } else if (double(count) > double(limits[i]) * kColumns[i].slack) {
        std::printf("FAILED: %s: %s: %ld, where the table says %ld\n", kernel.c_str(), kColumns[i].name,
                    count, limits[i]);
        ++failed;
      }
    }
    if (path.empty()) std::printf("\n");
  }
  return failed != 0;
}

}  // namespace
}  // namespace kernelmeta
