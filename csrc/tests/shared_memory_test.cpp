// What the CUDA kernels lay out in shared memory at the published sizes fits the smallest of the cards that
// have much of it (A100: 163 KB a block; H100, H200: 227 KB), features excepted.
#include <cstdio>

#include "cuda/bodies.h"
#include "cuda/team.h"

namespace {

using namespace kernelmeta;
using Block = TeamBlock<CudaTeam<256>, float, float, Sizes>;

template <class Layout, class... Args>
int check(const char* name, const Sizes& s, int64_t limit, const Args&... args) {
  Arena<float> count(nullptr, INT64_MAX, nullptr);
  Block block;
  Layout unused(count, block, s, args...);
  const int64_t bytes = int64_t(sizeof(float)) * (Staging<float>::kElements + count.used());
  std::printf("%s, %ld-way, %ld query rows, %ld features, %ld steps: %ld bytes of shared memory\n", name,
              long(s.N), long(s.Q), long(s.D), long(s.K), long(bytes));
  if (bytes <= limit) return 0;
  std::printf("FAILED: the limit is %ld\n", long(limit));
  return 1;
}

}  // namespace

int main() {
  constexpr int64_t kA100 = 163 * 1024, kH100 = 227 * 1024, kStatic = 1024;
  //             T  S  Q   N  D    H   K
  const Sizes s{1, 5, 75, 5, 640, 40, 3};
  SibForward<float> forward{};
  SibBackward<float> backward{};
  forward.problem.s = backward.problem.s = s;
  int status = check<SibForwardLayout<Block>>("sib", s, kA100 - kStatic, forward, 0.0f, 0.0f);
  status |= check<SibBackwardLayout<Block>>("sib_backward", s, kH100 - kStatic, backward, 0.0f, 0.0f);
  return status;
}
