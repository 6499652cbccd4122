// A part of a row belongs to the lanes that the row's entries belong to, in warps as wide as a GPU's: where
// words on rows follow each other without a barrier, that is what keeps them apart.
#include <cstdio>
#include <vector>

#include "cuda/block.h"

namespace {

using namespace kernelmeta;

// One thread that plays each of the team's in turn.
struct OneByOne {
  static constexpr int kThreads = 64, kLanes = 32;
  inline static int playing = 0;

  static int thread() { return playing; }
  static void sync(SourceLine) {}
  static void sync_warp() {}
};
using Block = TeamBlock<OneByOne, float, float, Sizes>;

// [entries] the lane of each entry that f visits
template <class Visit>
std::vector<int> lanes(int64_t entries, Visit visit) {
  std::vector<int> of_entry(size_t(entries), -1);
  for (int lane = 0; lane < OneByOne::kLanes; ++lane) {
    OneByOne::playing = OneByOne::kLanes + lane;
    visit([&](auto at) { of_entry[size_t(at.at)] = lane; });
  }
  return of_entry;
}

}  // namespace

int main() {
  int failed = 0;
  const int64_t ld = 160;
  const std::vector<int> row = lanes(ld, [&](auto f) { Block::RowOf<true>{ld}.each(f); });
  for (int64_t first = 0; first < ld; first += kAlign) {
    for (const int64_t count : {int64_t(1), int64_t(16), int64_t(33)}) {
      if (first + padded(count) > ld) continue;
      const std::vector<int> part =
          lanes(padded(count), [&](auto f) { Block::RowOf<true>{ld}.part(first, count).each(f); });
      for (size_t i = 0; i < part.size(); ++i) {
        if (part[i] == row[size_t(first) + i]) continue;
        std::printf("FAILED: entry %zu of the part from %ld on is lane %d's, not lane %d's\n", i, long(first),
                    part[i], row[size_t(first) + i]);
        ++failed;
      }
    }
  }
  return failed != 0;
}
